"""A loss function that was captured: forward and backward, as two CUDA graphs.

To the rest of a step it is a loss function like any other: its loss has a gradient, and
``on_loss``, scaling, weighing, accumulation and the reduction know nothing of it. Replayed, it does
what it did when it was captured, to the numbers of another batch. So it is watched in the first
micro-steps, which run one by one, and what a graph would freeze is refused in words.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from dtrain import accelerator
from dtrain.context import Context, Loss, Mean, Step
from dtrain.errors import ConfigError, DtrainError, LossError
from dtrain.step.graph_limits import (
    NUMBERS,
    OUT,
    Seen,
    Still,
    Told,
    check_numbers,
    drawn_from,
    form_of,
    is_on,
    name_of,
    numbers_of,
    rebuilt,
    shapes_of,
)
from dtrain.step.loss_forms import LossFn, as_loss
from dtrain.step.parameters import Parameters
from dtrain.step.precision import Precision

_WARM = 3  # micro-steps of a form that run one by one before it is captured
_FORMS = 16  # that are kept in mind
_LOOKS_AT = 32  # micro-steps, of which more than half should be replayed


class Graphed:
    """Runs the loss function, one by one or captured. Ranks: all, local.

    Each rank captures for itself, as soon as it has seen batches of one form often enough. Batches
    of another form, such as a ragged last one, run one by one.
    """

    def __init__(
        self,
        context: Context,
        loss_fn: LossFn,
        precision: Precision,
        trained: Parameters,
        device: accelerator.Accelerator | None,
    ) -> None:
        self._context = context
        self._loss_fn = loss_fn
        self._precision = precision
        self._trained = trained
        self._still: Any = Still(context)
        self._graphs = None if device is None else device.graphs()
        self._told_of_device = False
        self.restart()

    def restart(self) -> None:
        """Begins or ends a fit: graphs, and the memory they hold, are of one fit only."""
        self._captured: _Captured | None = None
        self._seen: dict[Any, Seen] = {}
        #: Of the model, after a call in the newest micro-step; and those that a call changes.
        self._numbers: dict[str, Any] | None = None
        self._counted: set[str] = set()
        self._told = False
        self._count = self._replays = 0
        if self._graphs is None and not self._told_of_device:
            self._told_of_device = True
            self._context.say(
                "graph=True: no CUDA here, so steps run one by one; what a graph could not hold is "
                "refused all the same"
            )

    def __call__(self, step: Step) -> Loss:
        """Returns the loss of the step's batch, checked."""
        tensors: list[Tensor] = []
        form = form_of(step.batch, tensors)
        if self._captured is not None and not self._captured.is_current():
            self._captured = None
            self._seen.clear()
            self._numbers = None
        if self._captured is None and self._graphs is not None:
            seen = self._seen.get(form)
            if seen is not None and seen.count >= _WARM:
                self._captured = self._capture(step, form, tensors, seen)
        if self._captured is None or self._captured.form != form:
            self._tell(tensors, replayed=False)
            return self._one_by_one(step, form, tensors)
        self._tell(tensors, replayed=True)
        self._numbers = None
        return self._captured.run(step, tensors)

    def backward(self, terms: Sequence[Tensor], starts: Sequence[Tensor | None]) -> None:
        """Runs backward; where it would only replay, without autograd, whose thread costs more."""
        captured = self._captured
        if captured is None or not captured.went_back(terms, starts):
            torch.autograd.backward(terms, starts)

    def _tell(self, tensors: list[Tensor], *, replayed: bool) -> None:
        """Tells of it, once, where most of the steps are not replayed."""
        self._count += 1
        self._replays += replayed
        if self._told or self._graphs is None or self._count < _LOOKS_AT:
            return
        if 2 * self._replays < self._count:
            self._told = True
            held = self._captured
            captured = "nothing is captured yet" if held is None else f"captured: {held.shapes}"
            self._context.say(
                f"note: graph=True: {self._count - self._replays} of {self._count} micro-steps ran "
                f"one by one, for their batches had other forms ({captured}; the newest: "
                f"{shapes_of(tensors)}). Pad batches to one shape, keep all else the same, {OUT}"
            )
        self._count = self._replays = 0

    # -- one by one ---------------------------------------------------------------------------

    def call(self, batch: Any) -> Any:
        with self._precision.autocast():
            return self._loss_fn(self._context.model, batch, self._still)

    def check(self, returned: Any, samples: int) -> Told:
        """Returns what the loss function returned as a loss, and the weight that it gave to it."""
        given = returned.weight if isinstance(returned, Loss) else None
        loss = as_loss(returned, samples, trains=True)
        loss.outputs = None  # a replay's would be overwritten
        return Told(loss, given)

    def _one_by_one(self, step: Step, form: Any, tensors: list[Tensor]) -> Loss:
        if len(self._seen) >= _FORMS and form not in self._seen:
            self._seen.clear()
        seen = self._seen.setdefault(form, Seen())
        then, self._numbers = self._numbers, None
        if seen.count >= _WARM:
            with self._beside():
                return self.check(self.call(step.batch), step.samples).loss
        device = self._context.device.type
        for tensor in tensors:
            if tensor.device.type != device:
                raise ConfigError(
                    f"graph=True: the batch holds a tensor on {tensor.device}, whose numbers a "
                    f"graph would never see again: in on_batch, move it to ctx.device, {OUT}"
                )
        numbers = numbers_of(self._context.model)
        if then is not None and self._context.progress.step_in_epoch:
            check_numbers(then, numbers, self._counted)
        before = drawn_from(device)
        with self._beside(), self._noticing(last=seen.count == _WARM - 1) as waits:
            returned = self.call(step.batch)
        if waits:
            raise LossError(
                f"graph=True: the host waits for the device in {waits[0]}, which a graph cannot "
                "hold: a number is read there (.item(), float(tensor), a mask as an index), or a "
                "tensor made of the host's numbers. Compute it on the device, such as by "
                f"torch.where; make constants before, as buffers or by torch.full; {OUT}"
            )
        after = drawn_from(device)
        if drawn := [name for name in after if repr(after[name]) != repr(before[name])]:
            raise LossError(
                f"graph=True: the loss function draws random numbers on the host ({drawn[0]}), and "
                "a graph would draw the same ones for ever: draw them in on_batch, or on the "
                f"device, as dropout does, {OUT}"
            )
        told = self.check(returned, step.samples)
        seen.take(told, device)
        self._numbers = now = numbers_of(self._context.model)
        self._counted |= {name for name in now if now[name] != numbers.get(name, now[name])}
        return told.loss

    def _beside(self) -> AbstractContextManager[None]:
        return nullcontext() if self._graphs is None else self._graphs.beside()

    def _noticing(self, *, last: bool) -> AbstractContextManager[list[str]]:
        # The first ones compile, and measure what is quickest.
        if self._graphs is None or not last:
            return nullcontext([])
        return self._graphs.noticing_waits()

    # -- captured -----------------------------------------------------------------------------

    def _capture(self, step: Step, form: Any, tensors: list[Tensor], seen: Seen) -> "_Captured":
        assert self._graphs is not None
        try:
            with self._context.long_operation("capturing a micro-step"):
                captured = _Captured(
                    self._context, self._trained, step, tensors, form, seen, self._counted
                )
                forward = partial(captured.forward, self)
                captured.take(*self._graphs.capture(forward, captured.backward))
                return captured
        except DtrainError:
            raise
        except Exception as error:
            if accelerator.is_out_of_memory(error):
                error.add_note(
                    "(graph=True: a captured micro-step keeps the memory of its forward and "
                    "backward, beside that of steps which run one by one, and of evaluations)"
                )
                raise
            raise LossError(
                f"graph=True: this micro-step cannot be captured as a CUDA graph: {error}. Neither "
                "in it nor in its backward may a number be read from the device (.item(), .cpu(), "
                "a mask as an index), a tensor be made of the host's numbers, or a graph be "
                "replayed (mode='reduce-overhead'); torch.utils.checkpoint wants "
                f"preserve_rng_state=False. Change that, {OUT}"
            ) from error


class _Captured:
    """A forward and a backward for batches of one form, which are copied to one place."""

    def __init__(
        self,
        context: Context,
        trained: Parameters,
        step: Step,
        tensors: list[Tensor],
        form: Any,
        seen: Seen,
        counted: set[str],
    ) -> None:
        self.form, self.shapes = form, shapes_of(tensors)
        self._context, self._trained = context, trained
        self._samples, self._device = step.samples, context.device
        self._inputs = [tensor.detach().clone() for tensor in tensors]
        self._batch = rebuilt(step.batch, iter(self._inputs))
        self._params = [*trained.trainable]
        self._anchor = torch.zeros((), device=self._device, requires_grad=True)
        #: What backward starts from.
        self._seed = torch.zeros((), dtype=seen.dtype, device=self._device)
        self._seeded: tuple[Tensor, int] | None = None  # of what that is a copy
        self._sums: list[Tensor] = []  # gradients over a step's micro-batches
        self._loss: Tensor | None = None  # with its graph, between the captures
        self._newest: ref[Tensor] | None = None  # the loss of a replay; it holds this
        self._is_last = False  # of a step's
        model = context.model
        self._buffers = [module._buffers for module in model.modules() if module._buffers]
        self._numbers = [
            (vars(module), key)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if type(value) in NUMBERS and name_of(name, key) not in counted
        ]
        self._found = self._look()

    def _look(self) -> list[Any]:
        """What must stay for the graph to be that of this model."""
        buffers = chain.from_iterable(b.values() for b in self._buffers)
        held = [b for b in buffers if b is not None]
        places = [*map(Tensor.data_ptr, chain(self._params, held))]
        return [self._context._taken, places, [of.get(key) for of, key in self._numbers]]

    def is_current(self) -> bool:
        return not self._trained.changed() and self._look() == self._found

    # What is captured. It returns what it writes.

    def forward(self, graphed: Graphed) -> list[Tensor | None]:
        told = graphed.check(graphed.call(self._batch), self._samples)
        loss = told.loss
        self._loss = loss.mean
        written = [loss.mean.detach()]

        def taken(value: Any) -> Any:
            if not is_on(value, self._device.type):
                return value
            written.append(value.detach())
            return _At(len(written) - 1)

        weight = told.weight
        if weight is not None:
            weight = taken(weight) if told.weighs_on_device(self._device.type) else loss.weight
        metrics = {
            name: Mean(taken(value.total), taken(value.weight))
            if isinstance(value, Mean)
            else taken(value)
            for name, value in loss.metrics.items()
        }
        self._weight, self._metrics = weight, metrics
        return [*written]

    def backward(self) -> list[Tensor | None]:
        assert self._loss is not None
        kept = [p.grad for p in self._params]
        for p in self._params:
            p.grad = None  # so each replay writes, and adds to nothing
        try:
            torch.autograd.backward(self._loss, self._seed)
            return [p.grad for p in self._params]
        finally:
            self._loss = None
            for p, grad in zip(self._params, kept, strict=True):
                p.grad = grad

    def take(self, forward: Any, backward: Any) -> None:
        """Takes both as graphs, with ``outputs`` and ``replay``."""
        self._forward, self._backward = forward, backward
        pairs = zip(self._params, backward.outputs, strict=True)
        self._pairs = [(p, grad) for p, grad in pairs if grad is not None]
        if any(grad.layout is not torch.strided for _, grad in self._pairs):
            raise ConfigError(f"graph=True: a gradient is sparse: use sparse=False, {OUT}")

    # What is done in each micro-step.

    def run(self, step: Step, tensors: list[Tensor]) -> Loss:
        with torch.no_grad():
            if tensors:
                torch._foreach_copy_(self._inputs, tensors)
            self._forward.replay()
            # The next replay writes into the same memory, and these may be looked at later.
            values = [*torch._foreach_mul(self._forward.outputs, 1)]
        self._is_last = is_last = step.micro + 1 == step.micros
        mean = _Replayed.apply(self._anchor, values, self, is_last)  # type: ignore[no-untyped-call]
        self._newest = ref(mean)

        def given(value: Any) -> Any:
            return values[value.place] if isinstance(value, _At) else value

        metrics = {
            name: Mean(given(value.total), given(value.weight))
            if isinstance(value, Mean)
            else given(value)
            for name, value in self._metrics.items()
        }
        weight = step.samples if self._weight is None else given(self._weight)
        return Loss(mean, weight, metrics)

    def went_back(self, terms: Sequence[Tensor], starts: Sequence[Tensor | None]) -> bool:
        """Runs backward, if it starts at the newest replay's loss, of which nobody made another."""
        newest, start = None if self._newest is None else self._newest(), starts[0]
        if newest is None or start is None or len(terms) != 1 or terms[0] is not newest:
            return False
        if newest._backward_hooks or newest.retains_grad or newest._version:
            return False
        with torch.no_grad():
            self.run_backward(start, is_last=self._is_last)
        return True

    def run_backward(self, grad: Tensor, *, is_last: bool) -> None:
        """Replays backward from a gradient of the loss, and adds to the parameters' gradients."""
        seeded = self._seeded
        if seeded is None or seeded[0] is not grad or seeded[1] != grad._version:
            self._seed.copy_(grad)
            self._seeded = grad, grad._version
        self._backward.replay()
        new = [pair for pair in self._pairs if pair[0].grad is None]
        if len(new) < len(self._pairs):
            old = [(g, grad) for p, grad in self._pairs if (g := p.grad) is not None]
            torch._foreach_add_([g for g, _ in old], [grad for _, grad in old])
        if new and not is_last:
            # The next micro-batch's backward writes into the same memory.
            sums = self._sums if len(new) == len(self._pairs) else []
            sums = sums or [torch.empty_like(grad) for _, grad in new]
            torch._foreach_copy_(sums, [grad for _, grad in new])
            self._sums = sums if len(new) == len(self._pairs) else self._sums
            new = [(p, one) for (p, _), one in zip(new, sums, strict=True)]
        for p, grad in new:
            p.grad = grad


class _Replayed(torch.autograd.Function):
    """The loss that a replay has written; its backward is a replay, too."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, values: list[Tensor], captured: _Captured, is_last: bool
    ) -> Tensor:
        ctx.captured, ctx.is_last = captured, is_last
        return values[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.captured.run_backward(grads[0], is_last=ctx.is_last)
        return None, None, None, None


class _At(NamedTuple):
    """Stands for what a graph writes."""

    place: int
