"""What loss functions may look like, and what they may return."""

import inspect
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.context import Context, Loss, Metrics, Number
from dtrain.errors import LossError
from dtrain.metrics import as_metrics

#: What one returns: Metrics where it is for evaluation only; or a generator of each update's name
#: and loss.
Returned = Loss | Metrics | Tensor | Generator[Any, None, None]
UserLoss = Callable[..., Returned]
LossFn = Callable[[nn.Module, Any, Context], Returned]


def as_loss(returned: object, samples: int, *, trains: bool = False) -> Loss:
    """Returns what a loss function returned as a checked :class:`Loss` with a weight."""
    if isinstance(returned, Generator):
        raise LossError(
            "loss_fn has a yield, which takes Trainer(optimizer={'name': ..., ...}) and names each "
            "update: `yield 'critic', loss`. It cannot evaluate: for that, pass eval_fn=..."
        )
    loss = Loss(returned) if isinstance(returned, Tensor) else returned
    if not isinstance(loss, Loss):
        if isinstance(loss, Metrics):
            raise LossError(
                "loss_fn returned dtrain.Metrics, which has no loss to train by: return "
                "dtrain.Loss, and dtrain.Metrics from another function, Trainer(eval_fn=...)"
            )
        has = " (it has one: return its .loss)" if hasattr(returned, "loss") else ""
        raise LossError(
            f"loss_fn returned {type(returned).__name__}; return a scalar tensor or dtrain.Loss"
            + has
        )
    if not isinstance(loss.mean, Tensor):
        raise LossError(f"Loss.mean is {type(loss.mean).__name__}, not a tensor")
    if loss.mean.is_complex():
        raise LossError(f"the loss is complex ({loss.mean.dtype}); take its .real, or its .abs()")
    if loss.mean.numel() != 1:
        raise LossError(
            f"the loss has shape {list(loss.mean.shape)}, not one number: use reduction='mean', "
            "or Loss.from_sum(total, weight) for a sum"
        )
    if loss.mean.dim():
        loss.mean = loss.mean.reshape(())
    weight = samples if loss.weight is None else loss.weight
    if isinstance(weight, Tensor) and weight.device.type == "cpu" and weight.numel() != 1:
        shape = list(weight.shape)
        raise LossError(f"the loss has a weight of shape {shape}, not one number")
    if not isinstance(weight, Tensor) or weight.device.type == "cpu":
        try:
            weight = float(weight)  # no sync: it is here already. NumPy's may be short of digits
        except (TypeError, ValueError, RuntimeError):
            raise LossError(f"the loss has weight {weight!r}, not one number") from None
        if not 0 <= weight < float("inf"):
            raise LossError(f"the loss has weight {weight}; it must be 0 or more, and finite")
    loss.weight = weight
    as_metrics(loss.metrics)
    if "loss" in loss.metrics:
        raise LossError("a metric is named 'loss', which is the loss itself; name it otherwise")
    if trains and not loss.mean.requires_grad:
        if _is_nothing(loss.weight):
            loss.weight = 0.0  # then it needs no gradient
            return loss
        raise LossError(
            "the loss has no gradient: it was detached, made under no_grad, or does not "
            "depend on any parameter that requires one"
        )
    return loss


def as_evaluated(returned: object, samples: int) -> Loss | Metrics:
    """Returns what a function for evaluation returned, checked, and with a weight."""
    if not isinstance(returned, Metrics):
        return as_loss(returned, samples)
    try:
        checked = as_loss(Loss(torch.zeros(()), returned.weight, returned.metrics), samples)
    except LossError as error:
        raise LossError(str(error).replace("the loss has", "dtrain.Metrics have")) from None
    returned.weight = checked.weight
    return returned


def _is_nothing(weight: Number | None) -> bool:
    """Says whether a weight is 0. On the GPU it is waited for, but where else there is an error."""
    try:
        return float(weight) == 0  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return False  # not one number, which is told elsewhere


_FORMS = "(model, batch) or (model, batch, ctx)"


def adapt(loss_fn: UserLoss, model: nn.Module | None = None) -> LossFn:
    """Returns ``loss_fn`` with three arguments, whether it was written with two or three.

    One that is a module must have no parameters that would be trained, but were not the model's.
    """
    given = written = loss_fn
    if isinstance(loss_fn, nn.Module):
        ours = set(map(id, model.parameters())) if model is not None else set()
        own = [n for n, p in loss_fn.named_parameters() if p.requires_grad and id(p) not in ours]
        if model is not None and own:
            raise LossError(
                f"loss_fn has parameters of its own, which nobody would train: {', '.join(own)}. "
                "Make them a part of the model, or freeze them (`requires_grad_(False)`)"
            )
        # How a module is called tells nothing: its `__call__` takes anything.
        written, loss_fn = loss_fn.forward, loss_fn.__call__
    try:
        parameters = list(inspect.signature(written).parameters.values())
    except (TypeError, ValueError):
        raise LossError(f"loss_fn must be a function that takes {_FORMS}, not {given!r}") from None
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    first, second = [*(p.name for p in by_place), "", ""][:2]
    if first == "batch" or second in ("target", "targets", "labels", "y_true"):
        raise LossError(
            f"loss_fn must take {_FORMS}, in this order, and {given!r} takes ({first}, {second}). "
            "A loss of outputs and targets is called in a function of your own, such as `lambda "
            "model, batch: criterion(model(batch[0]), batch[1])`"
        )
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return loss_fn if by_place else _of_any(loss_fn)
    # An optional context is known by its name: a third argument may as well be a number.
    wants = next((p for p in parameters if p.name == "ctx" or p.annotation is Context), None)
    needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if needed == by_place[:3] and len(needed) == 3 and (wants is None or wants in needed):
        return loss_fn
    if needed in (by_place[:2], [*by_place[:2], wants]) and len(by_place) >= 2:
        if wants is None or not (wants.default is None or wants.default is wants.empty):
            return lambda model, batch, ctx: loss_fn(model, batch)
        if wants in by_place[2:3]:
            return loss_fn
        name = wants.name
        return lambda model, batch, ctx: loss_fn(model, batch, **{name: ctx})
    raise LossError(
        f"loss_fn must take {_FORMS}; {given!r} takes "
        f"{', '.join(p.name for p in parameters) or 'nothing'}"
    )


def _of_any(loss_fn: UserLoss) -> LossFn:
    """Returns a function of any arguments with words for what it may pass them on to."""

    def called(model: nn.Module, batch: Any, ctx: Context) -> Returned:
        try:
            return loss_fn(model, batch, ctx)
        except TypeError as error:
            if "positional argument" in str(error):
                error.add_note(
                    "(loss_fn takes any arguments, so it was given model, batch and ctx. If that "
                    "is a decorator's doing, let it say what it wraps: functools.wraps)"
                )
            raise

    return called
