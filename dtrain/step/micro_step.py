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
from time import perf_counter
from typing import Any

from torch import Tensor, nn

from dtrain.callback import Callback, Hooks
from dtrain.context import Context, Loss, Step
from dtrain.data import EndOfStream, MicroBatches
from dtrain.distributed import DATA, FIRST_DATA
from dtrain.errors import ConfigError, LossError
from dtrain.metrics import Means, as_metrics
from dtrain.step.gather_with_grad import Gathers
from dtrain.step.idle import idle
from dtrain.step.lane import Lane, Slot
from dtrain.step.precision import Precision
from dtrain.step.votes import Agreement
from dtrain.watchdog import StragglerClock

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
        gathers: serves the loss function's gathers.
        clock: told how long this rank waits for data.
        means: collects the loss function's metrics.
        find_unused: True where the reduction looks for unused parameters itself.
        may_idle: False where ranks wait for one another inside of the model.

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
        gathers: Gathers,
        clock: StragglerClock,
        means: Means,
        find_unused: bool = False,
        may_idle: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        # Registered here, so that DDP reduces it; the user's model never sees it.
        self.lane_param = lane.param
        self.lane = lane
        self.trouble: Trouble | None = None
        #: Whether backward of this micro-batch meets other ranks in a gather.
        self.gathers = False
        #: Whether losses are multiplied by a loss scale.
        self.scales_loss = precision.scales_loss
        #: Whether this rank had a loss in this micro-batch.
        self.has_loss = False
        self._loss_fn = loss_fn
        self._precision = precision
        self._hooks = hooks
        self._context = context
        self._means = means
        self._find_unused = find_unused
        self._may_idle = may_idle
        self._agreement = agreement
        self._gathers = gathers
        self._clock = clock
        #: Whether the reference weight is that of real batches, not a guess.
        self.weighed = False
        #: The model's parameters that require a gradient.
        self.trainable: list[nn.Parameter] = []
        self._sparse: list[Tensor] = []

    def restart(self, weight: float) -> None:
        """Begins a fit.

        Args:
            weight: what a step is expected to weigh, over all ranks; 0 where nobody knows.

        Ranks: all, local; must be called on all ranks.
        """
        self.trouble = None  # of an earlier fit, if that failed
        self.lane.restart(weight)
        self.weighed = not self._precision.scales_loss
        self._gathers.restart()

    def take_trainable(self) -> list[int]:
        """Looks up which parameters require a gradient now; returns their places in the model.

        Raises:
            ConfigError: none does.
        """
        places = [i for i, p in enumerate(self.model.parameters()) if p.requires_grad]
        if not places:
            raise ConfigError("every parameter of the model is frozen: nothing to train")
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._sparse = [
            module.weight
            for module in self.model.modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        ]
        return places

    def forward(self, step: Step, feed: MicroBatches | None, last: bool) -> tuple[Tensor, ...]:
        """Runs a micro-batch; returns what to call backward on.

        In the last one that is the lane's voice and then the terms of the loss; before, only
        the terms, if there are any.

        Args:
            step: handed to the hooks.
            feed: gives the micro-batch; None only fixes DDP's buckets.
            last: the last micro-batch of the step, in which gradients are reduced.
        """
        step.loss = None
        voice = self.lane.attach() if last else None
        loss = None
        if feed is not None:
            loss = self._try(step, feed)
            if loss is None and not self._may_idle:
                self._refuse_to_idle()
            self._meet(loss, step)
        self.has_loss = loss is not None
        terms = [] if voice is None else [voice]
        if loss is not None:
            terms.append(self._weigh(loss, step.samples))
        ties = self._gathers.take_ties()
        self.gathers = bool(ties)
        terms += ties
        if last:
            if feed is not None:  # nobody listens to a step that only fixes the buckets
                self._agreement.say(self.lane)
                self._look_ahead(feed)
            # With find_unused, gradients of zero would make AdamW decay an unused parameter.
            if loss is None and not self._find_unused:
                terms.append(idle(self.trainable[::-1], self._sparse))
            self._clock.forwarded()
        return tuple(terms)

    def fail(self, error: Exception, where: str) -> None:
        """Keeps what went wrong until the step in which all ranks learn of it."""
        self.trouble = Trouble(error, where)
        self.lane.say(Slot.ERROR)

    def _refuse_to_idle(self) -> None:
        """Raises here and now: the others wait in the model, and must find this rank gone."""
        if self.trouble is not None:
            raise self.trouble.error
        raise ConfigError(
            "this rank has no batch in this micro-step, left it out, or its loss weighs nothing; "
            "but the other ranks wait for it in SyncBatchNorm. Use batches of at least one sample "
            "for each rank and micro-batch, `when_uneven='stop'` for streams, and no skip; or a "
            "model without SyncBatchNorm"
        )

    def _meet(self, loss: Loss | None, step: Step) -> None:
        """Ends the micro-step together, where ranks must: in the first one, or to gather."""
        weight = 0.0 if loss is None or self.weighed else float(loss.weight or 0)
        completed = step.loss is not None and (self.weighed or weight > 0)
        done = self._gathers.finish(weight, completed=completed)
        if self.weighed:
            return
        # In float16 a sum over a million tokens would leave no room for the loss scale, so that
        # the first steps would be lost to finding a smaller one.
        weights = [one.weight for one in done] or [weight]
        if any(weights):
            share = sum(weights) / sum(weight > 0 for weight in weights)
            self.lane.expect(share * step.micros * len(weights))
            self.weighed = True

    def _try(self, step: Step, feed: MicroBatches) -> Loss | None:
        """Runs the loss function; returns None where this rank has nothing to say."""
        if self.trouble is not None:
            return None
        request, comm = self._context.request, self._context.comm
        activity = comm.activity
        first = not (self._context.progress.step_in_epoch or step.micro)
        where = "data"
        activity.enter(FIRST_DATA if first else DATA)
        try:
            since = perf_counter()
            fetched = feed.next()
            self._clock.waited_for_data(since)
            if fetched is None:
                return None  # fewer samples than ranks: this one has none in this step
            step.batch, step.samples = fetched
            if step.micro == 0:
                self.lane.say(Slot.FED)
            request.skippable = True
            where = "on_batch"
            activity.has_data(first=first)
            comm.serve_gathers(self._gathers)
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
                if self._hooks.has(Callback.on_loss):  # what it left may be anything
                    step.loss = _with_gradient(step.loss, step.samples)
                where = "loss_fn"
            return self._checked(step.loss, step.samples)
        except EndOfStream:
            if step.micro == 0 and feed.is_last():
                self.lane.say(Slot.STARVED)
            return None
        except Exception as error:  # noqa: BLE001 -- every rank learns of it, through the lane
            if where == "data" and request.pending["preempt"]:
                # A TERM to every process of the job has ended this rank's loader workers, too.
                self.lane.say(Slot.LEAVING)
                return None
            self.fail(error, where)
            return None
        finally:
            request.skippable = False
            comm.serve_gathers(None)

    def _look_ahead(self, feed: MicroBatches) -> None:
        if self.trouble is not None:
            return
        try:
            if feed.is_last():
                self.lane.say(Slot.ENDING)
        except Exception as error:  # noqa: BLE001 -- as above: the stream is the user's
            self.fail(error, "data")

    def _loss(self, step: Step) -> Loss:
        with self._precision.autocast():
            returned = self._loss_fn(self.model, step.batch, self._context)
        return _with_gradient(returned, step.samples)

    def _checked(self, loss: Loss | None, samples: int) -> Loss | None:
        """Returns the loss with a weight and its metrics counted; None where it weighs nothing."""
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
        loss.weight = weight
        return loss

    def _weigh(self, loss: Loss, samples: int) -> Tensor:
        assert loss.weight is not None
        return self._precision.scale(self.lane.add(loss.mean, loss.weight, samples))


def _with_gradient(returned: object, samples: int) -> Loss:
    loss = as_loss(returned, samples)
    if not loss.mean.requires_grad:
        raise LossError(
            "the loss has no gradient: it was detached, made under no_grad, or does not "
            "depend on any parameter that requires one"
        )
    return loss


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
