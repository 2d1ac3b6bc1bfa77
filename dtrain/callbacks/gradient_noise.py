"""Gaussian noise on gradients, that fades as the training goes on."""

import math

import torch

from dtrain.callback import Callback
from dtrain.context import Context, Step
from dtrain.distributed import own_part, placed_like
from dtrain.errors import ConfigError


class GradientNoise(Callback):
    """Adds noise of variance ``eta / (1 + t) ** gamma`` to each gradient.

    ``t`` counts the updates so far (Neelakantan et al., "Adding gradient noise improves learning
    for very deep networks", arXiv:1511.06807). The noise is added once a step, to the gradient
    of the global batch, and all ranks draw the same, from ``ctx.shared_rng``: the parameters
    stay equal, and the variance is not divided by the number of ranks. It is drawn on the CPU,
    because two kinds of GPU would not draw the same: a second or so for 10^8 parameters. Of a
    sparse gradient, the rows that it has get noise; of a sharded one, each rank draws all of it,
    one after another, and keeps its own rows. Put it after ``ClipGradients`` in the list, or it is
    clipped as well.

    Args:
        eta: the variance at the first step, above 0; the paper chose from 0.01, 0.3 and 1.
        gamma: how fast it fades, 0 or more.
    """

    asks_for_gradients = True

    def __init__(self, eta: float, gamma: float = 0.55) -> None:
        if not (0 < eta < math.inf and 0 <= gamma < math.inf):
            raise ConfigError(
                f"GradientNoise(eta={eta}, gamma={gamma}): eta must be more than 0, gamma 0 or more"
            )
        self._eta = eta
        self._gamma = gamma

    def on_grads_ready(self, ctx: Context, step: Step) -> None:
        ctx.gradients()  # normalised and clipped from here on
        sigma = math.sqrt(self._eta / (1 + ctx.progress.updates) ** self._gamma)
        for group in ctx.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    p.grad = p.grad.coalesce()
                grad = p.grad.values() if p.grad.is_sparse else p.grad
                noise = torch.randn(grad.shape, generator=ctx.shared_rng, dtype=grad.dtype)
                mine = own_part(placed_like(noise, grad))
                own_part(grad).add_(mine.to(grad.device, non_blocking=True), alpha=sigma)
