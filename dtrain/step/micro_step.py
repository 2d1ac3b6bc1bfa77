"""One micro-step: one forward, one try.

DDP wraps :class:`MicroStep`, not the user's model: fetch, ``on_batch``, the loss function and
``on_loss`` happen inside its forward. So the loss function may use the model in any way it likes,
and an exception or a skip becomes an *idle* term: zero weight, reduced like any other. Nobody
waits for a rank that had nothing to say.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from time import perf_counter

import torch
from torch import Tensor, nn

from dtrain import accelerator
from dtrain.callback import Callback, Hooks
from dtrain.context import Context, Loss, Step
from dtrain.data import EndOfStream, MicroBatches
from dtrain.distributed import DATA, FIRST_DATA
from dtrain.errors import ConfigError, LossError
from dtrain.metrics import Means
from dtrain.step.gather_with_grad import Gathers
from dtrain.step.lane import Backward, Lane, Slot, idle
from dtrain.step.loss_forms import LossFn, as_loss
from dtrain.step.loss_words import explain
from dtrain.step.memory_words import explain_memory
from dtrain.step.parameters import Parameters
from dtrain.step.precision import Precision
from dtrain.step.votes import Agreement
from dtrain.watchdog import StragglerClock

_GRAD = attrgetter("grad")
_OWN_BACKWARD = (
    "a backward() ran in the loss function or a hook, before dtrain's own, which alone is reduced "
    "over ranks. Return the loss instead, or the sum of several; for a gradient that the loss is "
    "made of, use torch.autograd.grad(..., create_graph=True)"
)
_CLEARED = (
    "the gradients of this step's earlier micro-batches were cleared or changed in the loss "
    "function or a hook, as by zero_grad() or backward(): they would be lost. Leave that out: "
    "dtrain clears gradients where a step begins, and runs backward itself"
)


@dataclass(eq=False, repr=False)
class MicroStep(nn.Module):
    """The module that DDP wraps: the user's model, the loss function and the lane."""

    context: Context
    loss_fn: LossFn  # already brought to three arguments by `adapt`
    lane: Lane  # what this rank says to the others
    precision: Precision
    hooks: Hooks
    agreement: Agreement  # requests that the reduction is to carry
    gathers: Gathers  # of the loss function
    means: Means  # of its metrics
    clock: StragglerClock  # told how long this rank waits for data
    find_unused: bool  # the reduction looks for unused parameters itself
    may_idle: bool  # False where ranks wait for one another inside of the model
    under_way: Step | None = None  # which it is the turn of
    weighed: bool = False  # the reference weight is that of real batches, not a guess
    has_loss: bool = False  # this rank had a loss in this micro-batch
    meets_in_backward: bool = False  # backward of this micro-batch takes part in a gather
    #: What calls the loss function, if that is captured, or yields several.
    computed: Callable[[Step], Loss] | None = None
    backward: Backward = torch.autograd.backward  # what runs backward, likewise
    is_followed: bool = False  # a verb that the others are in is one that this rank will come to
    looks_itself: bool = True  # whether others are to be trained; else its strategy does before
    update: str = (
        ""  # of several, whose parameters are reduced: those of the optimizer of that name
    )

    # A module's own looks for parameters in whatever is set: a microsecond for each, in each step.
    __setattr__ = object.__setattr__  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__init__()
        self.add_module("model", self.context.model)
        self.model = self.context.model
        # Registered here, so that DDP reduces it; the user's model never sees it.
        self.register_parameter("lane_param", self.lane.param)
        self.trained = Parameters(self.context, self.update or None)
        self.prefix = f"train/{self.update}/" if self.update else "train/"  # of its figures
        self.suffix = f" (update {self.update!r})" if self.update else ""  # of where it failed
        if self.update:
            self.lane.inputs = partial(_inputs, self.context, self.update, self.gathers)
        self.trainable: list[nn.Parameter] = []  # the model's parameters that are reduced
        self.changed = False  # this rank has found others to train, in this step
        self._tie: Tensor | None = None
        self._sparse: list[Tensor] = []

    def restart(self, weight: float) -> None:
        self.agreement.trouble = None  # of an earlier fit, if that failed
        self.lane.restart(weight)
        self.weighed = not self.precision.scales_loss
        self.gathers.restart()

    def take_trainable(self) -> None:
        """Looks up which parameters require a gradient now."""
        self.trained.take()
        self.trainable, self.changed, self._tie = self.trained.trainable, False, None
        if self.update:  # for DistributedDataParallel, which reduces all others
            mine = {*map(id, self.trainable)}
            others = [n for n, p in self.model.named_parameters() if id(p) not in mine]
            self._ddp_params_and_buffers_to_ignore = {f"model.{name}" for name in others}
        self._sparse = [
            module.weight
            for module in self.model.modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        ]

    def tie(self) -> None:
        """Keeps the way by which a reduction that watches autograd's nodes hears of each parameter.

        Autograd no longer takes it to one that was frozen or replaced, or to one that was cast and
        back, which has another node.
        """
        self.lane.attach()  # before: the lane stays the last that autograd comes to
        self._tie = idle(self.trainable[::-1], self._sparse) if self.trainable else None
        self.trained.watch_nodes()

    def forward(self, step: Step, feed: MicroBatches | None, last: bool) -> tuple[Tensor, ...]:
        """Runs a micro-batch; returns what to call backward on: terms of the loss, if any.

        In the ``last`` of the step, in which gradients are reduced, the lane's voice comes first.
        A ``feed`` of None only fixes DDP's buckets.
        """
        self.under_way, step.loss = step, None
        loss = None
        terms = [self.lane.attach()] if last else []
        if feed is not None:
            loss = self._try(step, feed)
            if loss is None and not self.may_idle:
                self._refuse_to_idle()
            self._meet(loss, step)
        self.has_loss = loss is not None
        if loss is not None:
            assert loss.weight is not None
            term = self.precision.scale(loss.mean)
            terms.append(self.lane.add(loss.mean, loss.weight, step.samples, term))
        ties = self.gathers.take_ties()
        self.meets_in_backward = bool(ties)
        terms += ties
        if last:
            if feed is not None:  # nobody listens to a step that only fixes the buckets
                if not step.replayed:
                    self.agreement.say(self.lane)
                self._look_ahead(feed)
                if self.looks_itself:
                    self.changed = self.trained.changed()
            if self.changed:
                self.lane.say(Slot.CHANGED)
            if self.changed and self._tie is not None:
                terms.append(self._tie)
                self.lane.reach(self._tie)
            # With find_unused, gradients of zero would make AdamW decay an unused parameter.
            elif loss is None and not self.find_unused and self.trainable:
                terms.append(idle(self.trainable[::-1], self._sparse))
            self.clock.forwarded()
        return tuple(terms)

    def fail(self, error: Exception, where: str) -> None:
        """Keeps what went wrong until the step in which all ranks learn of it."""
        explain(error)
        explain_memory(error, where, self.under_way, self)
        if accelerator.is_lost(error):  # and with it what a reduction would take
            self.context.comm.record(error, where)
            raise error
        comm = self.context.comm
        # The others may wait for this rank in a verb of their hooks or loss functions; or it is in
        # one that it has been told of another's failure, which has left.
        in_a_verb = not self.is_followed and comm.activity.are_in_a_verb()
        if comm.has_left(error) or in_a_verb:
            comm.fail(error, where)
            try:
                raise error
            finally:
                del error  # its traceback has this frame
        self.agreement.trouble = error, where + self.suffix
        self.lane.say(Slot.ERROR)

    def _refuse_to_idle(self) -> None:
        """Raises here and now: the others wait in the model, and must find this rank gone."""
        if self.agreement.trouble is not None:
            raise self.agreement.trouble[0]
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
        done = self.gathers.finish(weight, completed=completed)
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
        if self.agreement.trouble is not None:
            self.lane.say(Slot.ERROR)  # it may be from before this step
            return None
        context, hooks = self.context, self.hooks
        request, comm = context.request, context.comm
        first = not (context.progress.step_in_epoch or step.micro)
        where = "data"
        before = _look_at(self.trainable) if step.micro else None
        comm.activity.enter(FIRST_DATA if first else DATA)
        try:
            since = perf_counter()
            fetched = feed.next()
            self.clock.waited_for_data(since)
            if fetched is None:
                return None  # fewer samples than ranks: this one has none in this step
            step.batch, step.samples = fetched
            if step.micro == 0:
                self.lane.say(Slot.FED)
            if step.batch is None:
                return None  # its samples were all left out
            request.skippable = True
            where = "on_batch"
            comm.activity.has_data(first=first)
            comm.serve_gathers(self.gathers)
            if not step.done:
                hooks.fire(Callback.on_batch, context, step)
            if not request.skipped:
                where = "loss_fn"
                if self.computed is not None:
                    step.loss = self.computed(step)
                else:
                    with self.precision.autocast():
                        returned = self.loss_fn(self.model, step.batch, context)
                    step.loss = as_loss(returned, step.samples, trains=True)
                where = "on_loss"
                hooks.fire(Callback.on_loss, context, step)
            if request.skipped:
                self.lane.say(Slot.SKIPPED)
                request.skipped.clear()
                return None
            if step.loss is None:
                raise LossError("on_loss left no loss in step.loss; use request.skip(why) to skip")
            if hooks.has(Callback.on_loss):  # what it left may be anything
                step.loss = as_loss(step.loss, step.samples, trains=True)
            where = "loss_fn"
            for p in self.trainable if step.micro == 0 else ():
                if p.grad is not None:
                    raise LossError(_OWN_BACKWARD)
            if before is not None and _look_at(self.trainable) != before:
                raise LossError(_CLEARED)
            return self._counted(step.loss)
        except EndOfStream:
            if step.micro == 0 and feed.is_last():
                self.lane.say(Slot.STARVED)
            return None
        except Exception as error:  # noqa: BLE001 -- every rank learns of it, through the lane
            if where == "data" and request.pending["preempt"]:
                # A TERM to every process of the job has ended this rank's loader workers, too.
                self.lane.say(Slot.LEAVING)
            else:
                self.fail(error, where)
            return None
        finally:
            request.skippable = False
            comm.serve_gathers(None)

    def _look_ahead(self, feed: MicroBatches) -> None:
        if self.agreement.trouble is not None:
            return
        try:
            if feed.is_last():
                self.lane.say(Slot.ENDING)
        except Exception as error:  # noqa: BLE001 -- as above: the stream is the user's
            self.fail(error, "data")

    def _counted(self, loss: Loss) -> Loss | None:
        """Counts the metrics; returns None where the loss weighs nothing."""
        weight = loss.weight
        assert weight is not None
        if not isinstance(weight, Tensor) and weight == 0:
            return None  # not `0 * mean`: the mean may be NaN
        replayed = self.under_way is not None and self.under_way.replayed  # counted already
        for name, value in () if replayed else loss.metrics.items():
            self.means.add(f"{self.prefix}{name}", value, weight)
        return loss


def _look_at(params: list[nn.Parameter]) -> list[int]:
    """Returns what differs where a gradient was replaced, removed or written to."""
    grads = [*map(_GRAD, params)]
    return [*map(id, grads), *(grad._version for grad in grads if grad is not None)]


def _inputs(context: Context, update: str, gathers: Gathers) -> list[Tensor]:
    """Returns what backward is to reach: of several updates, only this one's parameters."""
    groups = context.optimizers[update].param_groups
    mine = [p for group in groups for p in group["params"] if p.requires_grad]
    return [*mine, *gathers.anchors]


def of_backward(error: Exception) -> Exception:
    """Returns ``error``, or what it means where the loss function has run backward itself."""
    if "backward through the graph a second time" not in str(error):
        return error
    meant = LossError(_OWN_BACKWARD)
    meant.__cause__ = error
    return meant.with_traceback(error.__traceback__)
