"""For optimizers that evaluate the loss several times in a step: LBFGS, SAM.

Such an optimizer is given a closure, which runs the step's micro-batches again, reduces, has
``on_grads_ready`` fire, and returns the mean loss over all ranks: so a line search decides alike on
all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.callback import Callback, Hooks
from dtrain.context import Context, Loss, Step
from dtrain.data import MicroBatch
from dtrain.step.loss_forms import LossFn, as_loss
from dtrain.step.precision import Precision
from dtrain.step.strategy import StepResult
from dtrain.step.updates import Again, Update, weakly

_VERSION = attrgetter("_version")


@dataclass(eq=False)
class Closures:
    """Evaluates a step again. Ranks: all, communicates."""

    context: Context
    loss_fn: LossFn
    precision: Precision
    hooks: Hooks
    part: Update

    def __post_init__(self) -> None:
        self._kept: dict[int, MicroBatch] = {}  # by micro-batch, as the loss function got it
        self.part.micro_step.computed = weakly(self._compute)

    def _compute(self, step: Step) -> Loss:
        self._kept[step.micro] = step.batch, step.samples
        with self.precision.autocast():
            returned = self.loss_fn(self.context.model, step.batch, self.context)
        return as_loss(returned, step.samples, trains=True)

    def kept(self, micro: int) -> MicroBatch:
        """Returns a micro-batch of the step; none where this rank had none, or has left it out."""
        return self._kept.get(micro, (None, 0))

    def of(self, step: Step, optimizer: Optimizer, failed: Callable[[Step], None]) -> Any:
        """Returns what steps it with a closure; ``failed`` raises what ranks have failed by."""
        return _WithClosure(self, step, optimizer, failed)

    def forget(self) -> None:
        """Ends a step: its batches may be large."""
        self._kept = {}

    def evaluate(self, first: Step, optimizer: Optimizer, failed: Callable[[Step], None]) -> Tensor:
        """Computes loss and gradients of a step's micro-batches with the parameters of now."""
        assert first.result is not None
        step = Step(number=first.number, micros=first.micros)
        step.replayed, step.done, step.counted = True, (("", first.result),), True
        strategy, part, comm = self.part.strategy, self.part, self.context.comm
        comm.activity.pass_on()
        strategy.clear(optimizer)
        part.lane.open()
        feed = Again(self, step.micros)
        for micro in range(step.micros):
            step.micro = micro
            strategy.run(step, feed, last=micro == step.micros - 1)
        step.result = result = StepResult(strategy, self.context.progress, counts=False)
        verdict = result.verdict()
        if verdict.errors:
            failed(step)
        part.gradients.take(optimizer, result.gate(waits=True))
        self.hooks.fire(Callback.on_grads_ready, self.context, step)
        return torch.tensor(verdict.loss_mean, dtype=part.lane.param.dtype)


class _WithClosure:
    def __init__(
        self,
        closures: Closures,
        step: Step,
        optimizer: Optimizer,
        failed: Callable[[Step], None],
    ) -> None:
        self._closures, self._first, self._optimizer = closures, step, optimizer
        self._failed = failed
        # What the loop has computed serves the first call, where nothing has changed since.
        self._is_new = True
        groups = optimizer.param_groups
        self._params = [p for group in groups for p in group["params"] if p.grad is not None]
        self._versions = [*map(_VERSION, self._params)]

    def step(self) -> None:
        try:
            self._optimizer.step(self._closure)  # type: ignore[arg-type]  # torch's take a tensor
        finally:
            self._closures.forget()

    def _closure(self) -> Tensor:
        is_new, self._is_new = self._is_new, False
        same = is_new and [*map(_VERSION, self._params)] == self._versions
        if same and all(p.grad is not None for p in self._params):
            return torch.tensor(self._first.loss_mean, dtype=torch.float64)
        with torch.enable_grad():
            return self._closures.evaluate(self._first, self._optimizer, self._failed)
