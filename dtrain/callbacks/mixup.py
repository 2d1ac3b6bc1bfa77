"""Mixup: training on mixtures of two samples and of their labels."""

import math

import numpy as np
import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor

from dtrain.callback import Callback
from dtrain.callbacks.targets import Place, with_soft_targets
from dtrain.context import Context, Step
from dtrain.data import tensors_of
from dtrain.errors import ConfigError, DataError


class Mixup(Callback):
    """Mixes each micro-batch with itself in another order, inputs and targets alike.

    ``x = m * x_i + (1 - m) * x_j``, of floats, and the same for the one-hot targets, with one ``m``
    a micro-batch from Beta(alpha, alpha) and ``j`` from a random permutation (Zhang et al.,
    "mixup: Beyond Empirical Risk Minimization", ICLR 2018). The loss function gets soft
    targets ``[B, C]``, which ``F.cross_entropy`` takes; evaluation gets its labels as they are.

    Partners are sought within a micro-batch, with the rank's own ``ctx.rng``: an exception to "one
    is many". With the same number of ranks, runs repeat and resume exactly.

    Args:
        alpha: how much is mixed: near 0 hardly, at 1 by any share alike.
        num_classes: ``C``.
        target: where a batch has its targets, if it is no pair ``(x, y)``: a key such as
            ``"labels"``, a place in a tuple, or several, for what is nested: ``(1, "labels")``.
            All other tensors in it are inputs.
    """

    def __init__(self, alpha: float, num_classes: int, *, target: Place | None = None) -> None:
        if not 0 < alpha < math.inf or num_classes < 2:
            raise ConfigError(
                f"Mixup(alpha={alpha}, num_classes={num_classes}): alpha must be more than 0, and "
                "there must be 2 classes or more"
            )
        self._alpha = alpha
        self._num_classes = num_classes
        self._target = target

    def on_batch(self, ctx: Context, step: Step) -> None:
        batch, _, y = with_soft_targets("Mixup", step.batch, self._target, self._num_classes)
        _check_inputs([part for part in tensors_of(batch) if part.ndim and part is not y], len(y))
        # Both draws are made on the CPU, from a generator that checkpoints hold.
        seed = int(torch.randint(2**63 - 1, (), generator=ctx.rng))
        share = float(np.random.default_rng(seed).beta(self._alpha, self._alpha))
        partners = torch.randperm(len(y), generator=ctx.rng).to(y.device, non_blocking=True)

        def mixed(part: Tensor) -> Tensor:
            return share * part + (1 - share) * part[partners] if part.ndim else part

        step.batch = recursively_apply(mixed, batch)


def _check_inputs(inputs: list[Tensor], count: int) -> None:
    """Raises DataError where something cannot be mixed, which would then belong to one sample."""
    found = ", ".join(f"{part.dtype} {list(part.shape)}" for part in inputs) or "none"
    if not inputs or not all(part.is_floating_point() and len(part) == count for part in inputs):
        raise DataError(
            f"Mixup: the inputs that come with {count} targets must be tensors of as many rows, "
            f"and of floats; they are {found}. What cannot be mixed must not be in the batch"
        )
