"""All gradients in one flat tensor, the lane at its end, and one reduction after backward.

Nothing overlaps with backward, so it is for models of about one bucket of DistributedDataParallel's
(25 MB). As nothing is reduced while backward runs, an exception in it becomes a vote like any
other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.data import StepFeed
from dtrain.errors import ConfigError
from dtrain.microstep import MicroStep
from dtrain.pulse import BACKWARD, OWN_BACKWARD
from dtrain.state import Step
from dtrain.strategies.replicated import Replicated
from dtrain.wire import Wire
from dtrain.world import World

#: Views begin at multiples of so many elements, as vectorised kernels want it.
_ALIGNMENT = 16


class Flat(Replicated):
    """Reduces all gradients at once, after backward. In a world of one it does nothing.

    Args:
        find_unused_parameters: set it where a step may leave parameters without gradient.

    Ranks: all, communicates.
    """

    # An idle rank's gradients are the zeros of its flat tensor.
    find_unused = True

    def __init__(self, *, find_unused_parameters: bool = False) -> None:
        super().__init__()
        self._may_be_unused = find_unused_parameters
        self._flats: list[_Flat] = []
        self._lane: Tensor | None = None  # the end of one of them
        self._wire: Wire | None = None
        self._spoke = False  # this rank has had a loss in this step

    def prepare_model(self, model: nn.Module, world: World) -> nn.Module:
        """Refuses what a flat tensor cannot hold.

        Raises:
            ConfigError: sparse gradients, or ranks that wait for one another inside of the model.

        Ranks: all, local.
        """
        if world.size > 1 and (why := unsuited(model)):
            raise ConfigError(f"strategy='flat' cannot train this model: {why}. Use 'ddp'.")
        return model

    def wrap(self, micro_step: MicroStep, world: World) -> None:
        """Makes the flat tensors, where there is another rank.

        Ranks: all, local.
        """
        self._take(micro_step, world)
        self._wire = world.gradients
        if world.size == 1:
            return
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        lane = micro_step.lane.param
        for p in micro_step.model.parameters():
            if p.requires_grad:
                by_dtype.setdefault(p.dtype, []).append(p)
        by_dtype.setdefault(lane.dtype, [])
        self._flats = [
            _Flat(params, lane.numel() if dtype == lane.dtype else 0, dtype, lane.device)
            for dtype, params in by_dtype.items()
        ]
        self._lane = next(flat.tail for flat in self._flats if flat.tail.numel())

    def run(self, step: Step, feed: StepFeed, last: bool) -> None:
        """Runs forward and backward; gradients are reduced after the last micro-batch.

        Ranks: all; communicates where ``last``.
        """
        micro_step = self._micro_step
        assert micro_step is not None, "wrap() comes first"
        if step.micro == 0:
            self._spoke = False
        terms = micro_step(step, feed, last)
        self._pulse.go(OWN_BACKWARD)
        if not self._flats:
            if last:
                micro_step.lane.backward(*terms)
            elif terms:
                torch.autograd.backward(terms)
            return
        losses = terms[1:] if last else terms  # the lane does not come by way of backward
        if losses:
            self._spoke = True
            self._backward(micro_step, losses)
        if last:
            self._pulse.go(BACKWARD)
            self._reduce(micro_step)

    def _backward(self, micro_step: MicroStep, losses: tuple[Tensor, ...]) -> None:
        try:
            torch.autograd.backward(losses)
        except Exception as error:
            if micro_step.gathers:
                raise  # others may be waiting for this rank in their own backward
            micro_step.fail(error, "backward")

    def _reduce(self, micro_step: MicroStep) -> None:
        assert self._wire is not None
        assert self._lane is not None
        complete = all(p.grad is not None for flat in self._flats for p in flat.params)
        if self._spoke and micro_step.trouble is None and not (complete or self._may_be_unused):
            micro_step.fail(self.unused(), "backward")
        for flat in self._flats:
            flat.fill(silent=micro_step.trouble is not None)
        self._lane.copy_(micro_step.lane.message())
        for flat in self._flats:
            self._wire.all_reduce(flat.whole)
            flat.whole.mul_(1 / self._world_size)
            flat.hand_out(all_used=not self._may_be_unused)

    @property
    def _world_size(self) -> int:
        assert self._world is not None
        return self._world.size

    def _reduced(self) -> Tensor | None:
        return self._lane

    def _waits_for_all(self) -> bool:
        return bool(self._flats)  # they are looked through before they are reduced

    def check_arrived(self) -> None:
        """Looks whether each parameter has a gradient, where one process trains.

        Ranks: all, local.
        """
        if not self._flats and not self._may_be_unused:
            self._check_gradients()

    def gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """Returns the flat tensors, as long as the gradients are views into them.

        Ranks: all, local.
        """
        if self._flats and all(flat.is_handed_out() for flat in self._flats):
            return [flat.gradients for flat in self._flats if flat.params]
        return super().gradients(optimizer)


@dataclass(slots=True)
class _Flat:
    """The gradients of all parameters of one dtype; see :class:`Flat`."""

    params: list[nn.Parameter]
    views: list[Tensor]
    whole: Tensor
    gradients: Tensor
    used: Tensor
    tail: Tensor

    def __init__(
        self, params: list[nn.Parameter], tail: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        places = [0]
        for p in params:
            places.append(places[-1] + -(-p.numel() // _ALIGNMENT) * _ALIGNMENT)
        self.params = params
        self.whole = torch.zeros(places[-1] + len(params) + tail, dtype=dtype, device=device)
        self.gradients, self.used, self.tail = self.whole.split([places[-1], len(params), tail])
        # As dense as the parameter, and in its order: fused optimizers go through both alike.
        self.views = [
            self.whole.as_strided(p.shape, torch.empty_like(p, device="meta").stride(), place)
            for p, place in zip(params, places, strict=False)
        ]

    def fill(self, *, silent: bool) -> None:
        """Takes in this rank's gradients; zeros where it has none, or is to say nothing."""
        grads = [None if silent else p.grad for p in self.params]
        given = [grad for grad in grads if grad is not None]
        if len(given) == len(grads):
            torch._foreach_copy_(self.views, given)
            self.used.fill_(1)
            return
        self.gradients.zero_()
        self.used.zero_()
        for place, grad in enumerate(grads):
            if grad is not None:
                self.views[place].copy_(grad)
                self.used[place] = 1

    def hand_out(self, *, all_used: bool) -> None:
        """Gives each parameter its view; none where no rank had a gradient, and that may be."""
        used = None if all_used else self.used.tolist()
        for place, (p, view) in enumerate(zip(self.params, self.views, strict=True)):
            p.grad = view if used is None or used[place] else None

    def is_handed_out(self) -> bool:
        """Says whether all gradients are views, or nothing: a callback may have replaced one."""
        return all(
            p.grad is None or p.grad is view
            for p, view in zip(self.params, self.views, strict=True)
        )


def unsuited(model: nn.Module) -> str:
    """Returns why a model cannot be trained with :class:`Flat`, or nothing.

    Ranks: all, local.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            return f"ranks wait for one another in {name or 'it'} (SyncBatchNorm)"
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            return f"gradients of {name or 'it'} are sparse"
    devices = {p.device for p in model.parameters() if p.requires_grad}
    if len(devices) > 1:
        return "it is spread over several devices"
    return ""
