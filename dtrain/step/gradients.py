"""The gradients of a step, once they are reduced, and what they are still to be divided by."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.step.precision import Factor, Precision
from dtrain.step.strategy import Gate, Strategy
from dtrain.step.taking import takes_a_veto


@dataclass(eq=False)
class Gradients:
    """Gradients that whoever asks for them finds normalised; and clipped, where that came before.

    On an accelerator, normalisation and clipping are one number, if every callback asks before it
    looks: a fused optimizer divides by it on its way, without a pass over the gradients. With
    another one, or on the CPU, they are multiplied at once.

    Ranks: all, local.
    """

    strategy: Strategy
    precision: Precision
    may_wait: bool  # on an accelerator, in float32, if every callback asks
    on_host: bool  # numbers can be read at once

    def take(self, optimizer: Optimizer, gate: Gate) -> None:
        """Begins with those of a step."""
        self.optimizer = optimizer
        self._norm: Tensor | None = None  # of the gradients as they are, while they wait
        #: What they are to be divided by still.
        self.divisor: Factor | None = None
        factor = self.precision.unscale(optimizer, gate.factor)
        is_one = isinstance(factor, float) and factor == 1.0
        may_wait = self.may_wait and takes_a_veto(optimizer)
        self._waits = may_wait and (is_one or factor is gate.factor)
        if not is_one and self._waits:
            self.divisor = gate.divisor
        elif not is_one:
            torch._foreach_mul_(self.strategy.gradients(optimizer), factor)

    def tensors(self) -> list[Tensor]:
        """Returns them all, to be looked at and changed: from here on nothing waits."""
        gradients = self.strategy.gradients(self.optimizer)
        self._waits, self._norm = False, None
        if self.divisor is not None:
            torch._foreach_div_(gradients, self.divisor)
            self.divisor = None
        return gradients

    def norm(self) -> Tensor:
        """Returns their joint Euclidean norm, 0-dim."""
        norm = self._norm
        if norm is None:
            norm = self.strategy.gradient_norm(self.optimizer)
        if self._waits:  # then nobody changes them
            self._norm = norm
        return norm if self.divisor is None else norm / self.divisor

    def check(self) -> Tensor:
        """Returns a number, 0-dim, that is finite if every gradient is, and their norm is."""
        if self._norm is not None:
            return self._norm
        gradients = self.strategy.gradients(self.optimizer)
        norm = self.strategy.norm_of(gradients)
        if self._waits and self.strategy.norm_is_of(gradients):
            self._norm = norm  # clipping need not compute it once more
        return norm

    def clip(self, max_norm: float) -> Tensor:
        """Bounds their joint norm; returns what it was."""
        if self._waits:
            norm, before = self.norm(), self.divisor
            assert self._norm is not None
            raw = self._norm.float()  # as optimizers take it, whatever gradients are
            # That of (norm + 1e-6) / max_norm, if it is more than 1.
            if isinstance(before, Tensor):
                excess = raw.add(before, alpha=1e-6) / max_norm
                self.divisor = torch.maximum(excess, before)
            else:
                least = 1.0 if before is None else before
                self.divisor = ((raw + 1e-6 * least) / max_norm).clamp(min=least)
            return norm
        norm = self.strategy.gradient_norm(self.optimizer)
        # No multiplication by 1, where the host knows.
        if not self.on_host or not float(norm) + 1e-6 < 0.999 * max_norm:
            # As torch.nn.utils.clip_grads_with_norm_ does, which wants parameters.
            coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(self.strategy.gradients(self.optimizer), coefficient)
        return norm

    def number_of(self, divisor: Factor) -> Tensor:
        """Returns what an optimizer is to divide by, as it takes it."""
        if isinstance(divisor, Tensor):
            return divisor
        device = self.strategy.gradients(self.optimizer)[0].device
        return torch.full((), divisor, device=device)
