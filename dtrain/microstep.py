"""One micro-step: one forward, one try.

DDP wraps :class:`MicroStep`, not the user's model. Whatever this rank does for a micro-batch
(fetch, ``on_batch``, the loss function, ``on_loss``) happens inside its forward, so the loss
function may use the model in any way it likes, and an exception or a skip is turned into an
*idle* term: zero weight, taking part in the reduction like any other. The other ranks never
wait for a rank that had nothing to say.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dtrain.agreement import Agreement
from dtrain.callback import Callback, Hooks
from dtrain.data import EndOfStream, StepFeed
from dtrain.errors import ConfigError, LossError
from dtrain.lane import Lane, Slot, idle
from dtrain.metrics import Means, as_metrics
from dtrain.precision import Precision
from dtrain.state import Context, Loss, Step

UserLoss = Callable[..., Loss | Tensor]
LossFn = Callable[[nn.Module, Any, Context], Loss | Tensor]


@dataclass(slots=True)
class Trouble:
    """An exception of this rank's, kept until the step in which all ranks learn of it."""

    error: Exception
    where: str


class MicroStep(nn.Module):
    """The module that DDP wraps: the user's model, the loss function and the lane.

    Args:
        model: the user's module.
        loss_fn: already brought to three arguments by :func:`adapt`.
        lane: what this rank says to the others.
        precision: the precision slot.
        hooks: the callbacks, for ``on_batch`` and ``on_loss``.
        context: what hooks get.
        agreement: requests that the reduction is to carry.
        means: collects the loss function's metrics.
        find_unused: True where the reduction looks for unused parameters itself.

    Ranks: all, local; DDP's reduction follows in backward.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        lane: Lane,
        *,
        precision: Precision,
        hooks: Hooks,
        context: Context,
        agreement: Agreement,
        means: Means,
        find_unused: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        # Registered here, so that DDP reduces it; the user's model never sees it.
        self.lane_param = lane.param
        self.lane = lane
        self.trouble: Trouble | None = None
        self._loss_fn = loss_fn
        self._precision = precision
        self._hooks = hooks
        self._context = context
        self._means = means
        self._find_unused = find_unused
        self._agreement = agreement
        self._trainable: list[nn.Parameter] = []

    def take_trainable(self) -> list[int]:
        """Looks up which parameters require a gradient now; returns their places in the model.

        Raises:
            ConfigError: none does.
        """
        places = [i for i, p in enumerate(self.model.parameters()) if p.requires_grad]
        if not places:
            raise ConfigError("every parameter of the model is frozen: nothing to train")
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        return places

    def forward(self, step: Step, feed: StepFeed, last: bool) -> Tensor | None:
        """Runs a micro-batch; returns the term to call backward on, or None for nothing.

        Args:
            step: handed to the hooks.
            feed: gives the micro-batch.
            last: the last micro-batch of the step, in which gradients are reduced.
        """
        step.loss = None
        # Recorded before the model's forward, so that its gradient arrives last.
        voice = self.lane.attach() if last else None
        term = self._term(step, feed)
        if voice is None:
            return term
        self._agreement.say(self.lane)
        if term is not None:
            return term + voice
        # With find_unused, gradients of zero would make AdamW decay an unused parameter.
        return voice if self._find_unused else voice + idle(self._trainable[::-1])

    def _term(self, step: Step, feed: StepFeed) -> Tensor | None:
        """The weighted, scaled loss; None where this rank has nothing to say."""
        if self.trouble is not None:
            return None
        request = self._context.request
        where = "data"
        try:
            fetched = feed.next()
            if fetched is None:
                return None  # fewer samples than ranks: this one has none in this step
            step.batch, step.samples = fetched
            request.skippable = True
            where = "on_batch"
            self._hooks.fire(Callback.on_batch, self._context, step)
            if not request.skipped:
                where = "loss_fn"
                step.loss = self._loss(step)
                where = "on_loss"
                self._hooks.fire(Callback.on_loss, self._context, step)
            if request.skipped:
                self.lane.say(Slot.SKIPPED)
                request.skipped.clear()
                return None
            if step.loss is not None:
                where = "loss_fn"
            return self._weigh(step.loss, step.samples)
        except EndOfStream:
            # A rank that ran dry in the middle of a step still had something to say.
            if step.micro == 0:
                self.lane.say(Slot.EXHAUSTED)
            return None
        except Exception as error:  # noqa: BLE001 -- every rank learns of it, through the lane
            self.trouble = Trouble(error, where)
            self.lane.say(Slot.ERROR)
            return None
        finally:
            request.skippable = False

    def _loss(self, step: Step) -> Loss:
        with self._precision.autocast():
            returned = self._loss_fn(self.model, step.batch, self._context)
        loss = as_loss(returned, step.samples)
        if not loss.mean.requires_grad:
            raise LossError(
                "the loss has no gradient: it was detached, made under no_grad, or does not "
                "depend on any parameter that requires one"
            )
        return loss

    def _weigh(self, loss: Loss | None, samples: int) -> Tensor | None:
        if loss is None:
            raise LossError("on_loss left no loss in step.loss; use request.skip(why) to skip")
        weight = loss.weight
        if weight is None:
            weight = samples
        if isinstance(weight, Tensor) and weight.device.type == "cpu":
            if weight.numel() != 1:
                raise LossError(
                    f"the loss has a weight of shape {list(weight.shape)}, not one number"
                )
            weight = float(weight)  # no sync: it is here already
        if not isinstance(weight, Tensor):
            if not 0 <= weight < float("inf"):
                raise LossError(f"the loss has weight {weight}; it must be 0 or more, and finite")
            if weight == 0:
                return None  # not `0 * mean`: the mean may be NaN
        for name, value in loss.metrics.items():
            self._means.add(f"train/{name}", value, weight)
        return self._precision.scale(self.lane.add(loss.mean, weight, samples))


def as_loss(returned: object, samples: int) -> Loss:
    """Returns what a loss function returned as a checked :class:`Loss` with a weight.

    Raises:
        LossError: it is neither a Loss nor a scalar tensor.
    """
    loss = Loss(returned) if isinstance(returned, Tensor) else returned
    if not isinstance(loss, Loss):
        raise LossError(
            f"loss_fn returned {type(returned).__name__}; return a scalar tensor or dtrain.Loss"
        )
    if not isinstance(loss.mean, Tensor):
        raise LossError(f"Loss.mean is {type(loss.mean).__name__}, not a tensor")
    if loss.mean.numel() != 1:
        raise LossError(
            f"the loss has shape {list(loss.mean.shape)}, not one number: use reduction='mean', "
            "or Loss.from_sum(total, weight) for a sum"
        )
    if loss.mean.dim():
        loss.mean = loss.mean.reshape(())
    if loss.weight is None:
        loss.weight = samples
    as_metrics(loss.metrics)
    if "loss" in loss.metrics:
        raise LossError("a metric is named 'loss', which is the loss itself; name it otherwise")
    return loss


def adapt(loss_fn: UserLoss) -> LossFn:
    """Returns ``loss_fn`` with three arguments, whether it was written with two or three.

    Raises:
        LossError: it takes another number of arguments.
    """
    parameters = inspect.signature(loss_fn).parameters.values()
    positional = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    if len(positional) == 3 or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return loss_fn
    if len(positional) == 2:
        return lambda model, batch, ctx: loss_fn(model, batch)
    raise LossError(
        f"loss_fn must take (model, batch) or (model, batch, ctx); {loss_fn!r} takes "
        f"{', '.join(p.name for p in parameters) or 'nothing'}"
    )
