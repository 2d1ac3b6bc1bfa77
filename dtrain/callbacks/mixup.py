"""Mixup: training on mixtures of two samples and of their labels."""

import math

import numpy as np
import torch
from torch import Tensor

from dtrain.callback import Callback
from dtrain.callbacks.targets import soft_targets
from dtrain.context import Context, Step
from dtrain.errors import ConfigError, DataError


class Mixup(Callback):
    """Mixes each micro-batch ``(x, y)`` with itself in another order, inputs and targets alike.

    ``x = m * x_i + (1 - m) * x_j``, of floats, and the same for the one-hot targets, with one ``m``
    a micro-batch from Beta(alpha, alpha) and ``j`` from a random permutation (Zhang et al.,
    "mixup: Beyond Empirical Risk Minimization", ICLR 2018). The loss function gets soft
    targets ``[B, C]``, which ``F.cross_entropy`` takes; evaluation gets its labels as they are.

    Partners are sought within a micro-batch, with the rank's own ``ctx.rng``: an exception to "one
    is many". With the same number of ranks, runs repeat and resume exactly.

    Args:
        alpha: how much is mixed: near 0 hardly, at 1 by any share alike.
        num_classes: ``C``.
    """

    def __init__(self, alpha: float, num_classes: int) -> None:
        if not 0 < alpha < math.inf or num_classes < 2:
            raise ConfigError(
                f"Mixup(alpha={alpha}, num_classes={num_classes}): alpha must be more than 0, and "
                "there must be 2 classes or more"
            )
        self._alpha = alpha
        self._num_classes = num_classes

    def on_batch(self, ctx: Context, step: Step) -> None:
        x, y = self._check(step.batch)
        # Both draws are made on the CPU, from a generator that checkpoints hold.
        seed = int(torch.randint(2**63 - 1, (), generator=ctx.rng))
        share = float(np.random.default_rng(seed).beta(self._alpha, self._alpha))
        partners = torch.randperm(len(x), generator=ctx.rng).to(x.device, non_blocking=True)
        step.batch = tuple(share * part + (1 - share) * part[partners] for part in (x, y))

    def _check(self, batch: object) -> tuple[Tensor, Tensor]:
        match batch:
            case [Tensor() as x, Tensor() as y] if x.is_floating_point():
                if y.ndim and len(y) != len(x):
                    raise DataError(f"Mixup: {len(x)} inputs, and {len(y)} targets")
                return x, soft_targets("Mixup", x, y, self._num_classes)
            case [*parts]:
                found = ", ".join(str(getattr(p, "dtype", type(p).__name__)) for p in parts)
            case _:
                found = type(batch).__name__
        raise DataError(f"Mixup: a batch must be a pair (x, y), x of floats; this is ({found})")
