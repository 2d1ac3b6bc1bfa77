"""What loss functions return, looked at once."""

import torch
from torch import Tensor

from dtrain.context import Loss, Metrics, Number
from dtrain.errors import LossError
from dtrain.metrics import as_metrics


def as_loss(returned: object, samples: int, *, trains: bool = False) -> Loss:
    """Returns what a loss function returned as a checked :class:`Loss` with a weight."""
    loss = Loss(returned) if isinstance(returned, Tensor) else returned
    if not isinstance(loss, Loss):
        if isinstance(loss, Metrics):
            raise LossError(
                "loss_fn returned dtrain.Metrics, which has no loss to train by: return "
                "dtrain.Loss, and dtrain.Metrics from another function, Trainer(eval_fn=...)"
            )
        raise LossError(
            f"loss_fn returned {type(returned).__name__}; return a scalar tensor or dtrain.Loss"
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
        raise LossError(f"the loss has a weight of shape {list(weight.shape)}, not one number")
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
