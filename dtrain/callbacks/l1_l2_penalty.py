"""L1 and L2 penalties on the weights, as a part of the loss."""

import math
from collections.abc import Callable

import torch
from torch import nn

from dtrain.callback import Callback
from dtrain.callbacks.argument_checks import some_of
from dtrain.context import Context, Step
from dtrain.distributed import named_parameters
from dtrain.errors import ConfigError


class L1L2Penalty(Callback):
    """Adds ``l1 * sum(|w|) + l2 * sum(w ** 2)`` to the loss.

    It is added to the mean of every micro-batch, and yet counts once, with more ranks and
    accumulation, too: a step's loss is a weighted mean, whose weights sum to 1. ``train/loss``
    includes it, ``eval/loss`` does not; ``train/penalty`` is the penalty alone.

    With SGD, ``l2`` is a ``weight_decay`` of ``2 * l2``; with Adam it is not the decoupled decay of
    AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019). A subgradient
    step of ``l1`` shrinks weights, and rarely makes one exactly 0.

    Args:
        l1: the factor of the sum of absolute values.
        l2: the factor of the sum of squares.
        params: says by name and parameter which are meant; by default those with two or more
            dimensions, not biases and the scales of norms. Frozen ones never count.
    """

    whole_weights = True

    def __init__(
        self,
        l1: float = 0.0,
        l2: float = 0.0,
        params: Callable[[str, nn.Parameter], bool] | None = None,
    ) -> None:
        if not (0 <= l1 < math.inf and 0 <= l2 < math.inf and l1 + l2 > 0):
            raise ConfigError(f"L1L2Penalty(l1={l1}, l2={l2}): from 0 on, and one of them above it")
        self._l1 = l1
        self._l2 = l2
        self._chosen = params or (lambda name, parameter: parameter.ndim >= 2)

    def on_fit_start(self, ctx: Context) -> None:
        named = list(named_parameters(ctx.model))
        if not (params := [p for name, p in named if self._chosen(name, p)]):
            raise ConfigError(
                f"L1L2Penalty(params=...) chose none of the model's {len(named)} parameters: "
                f"{some_of([name for name, _ in named], 20)}"
            )
        sparse = {
            id(module.weight): name
            for name, module in ctx.model.named_modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        }
        if names := [sparse[id(p)] for p in params if id(p) in sparse]:
            raise ConfigError(
                f"L1L2Penalty: gradients of {some_of(names, 5)} are sparse, and a penalty's are "
                "not. Make it with sparse=False, or leave it out: L1L2Penalty(params=lambda name, "
                f"p: p.ndim >= 2 and not name.startswith({names[0]!r}))"
            )

    def on_loss(self, ctx: Context, step: Step) -> None:
        assert step.loss is not None
        penalty = torch.zeros_like(step.loss.mean)
        # Asked each time: a hook may freeze, replace or add some.
        for name, p in named_parameters(ctx.model):
            if p.requires_grad and self._chosen(name, p):
                if self._l1:
                    penalty = penalty + self._l1 * p.abs().sum()
                if self._l2:
                    real = torch.view_as_real(p) if p.is_complex() else p
                    penalty = penalty + self._l2 * real.square().sum()
        step.loss.mean = step.loss.mean + penalty
        # A metric is weighted as the loss is, so that their difference is the loss without it.
        step.loss.metrics = {**step.loss.metrics, "penalty": penalty.detach()}
