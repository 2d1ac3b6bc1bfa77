"""L1 and L2 penalties on the weights, as a part of the loss."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dtrain.callback import Callback
from dtrain.callbacks.argument_checks import some_of
from dtrain.context import Context, Step
from dtrain.distributed import copies_of, named_parameters, own_part
from dtrain.errors import ConfigError


class L1L2Penalty(Callback):
    """Adds ``l1 * sum(|w|) + l2 * sum(w ** 2)`` to the loss.

    It is added to the mean of every micro-batch, and yet counts once, with more ranks and
    accumulation, too: a step's loss is a weighted mean, whose weights sum to 1. ``train/loss``
    includes it, ``eval/loss`` does not; ``train/penalty`` is the penalty alone.

    With SGD, ``l2`` is a ``weight_decay`` of ``2 * l2``; with Adam it is not the decoupled decay of
    AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019). A subgradient
    step of ``l1`` shrinks weights, and rarely makes one exactly 0.

    Where parameters are sharded, no rank could differentiate it: its gradient is added to that of
    the global batch, before other callbacks look at it, so a factor that an ``on_loss`` later in
    the list gives the loss does not reach it; and ranks add up its value where a step begins.

    Args:
        l1: the factor of the sum of absolute values.
        l2: the factor of the sum of squares.
        params: says by name and parameter which are meant; by default those with two or more
            dimensions, not biases and the scales of norms. Frozen ones never count.

    Ranks: all, communicates once a step where parameters are sharded.
    """

    asks_for_gradients = True
    completes_gradients = True

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
        # Of a sharded model: which parameters count in this step, what they were as it began, and
        # what the penalty is.
        self._counted: list[nn.Parameter] = []
        self._began: list[int] = []
        self._value: Tensor | None = None

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

    def on_step_start(self, ctx: Context, step: Step) -> None:
        if not ctx.sharded:
            return
        # While the model runs, parameters are gathered, some at a time.
        self._counted = self._now(ctx)
        self._began = _versions(self._counted)
        with torch.no_grad():
            mine = torch.zeros((), dtype=torch.float64, device=ctx.device)
            # Each row counts once, also where several ranks hold it.
            held = [copies_of(p) for p in self._counted]
            for copies in {*held}:
                pairs = zip(self._counted, held, strict=True)
                rows = [own_part(p) for p, of in pairs if of == copies]
                mine += self._of(rows, torch.zeros_like(mine)) / copies
        self._value = ctx.comm.all_reduce("penalty", mine)

    def on_loss(self, ctx: Context, step: Step) -> None:
        assert step.loss is not None
        if self._value is not None:
            penalty = self._value.to(step.loss.mean)
        else:
            penalty = self._of(self._now(ctx), torch.zeros_like(step.loss.mean))
        step.loss.mean = step.loss.mean + penalty
        # A metric is weighted as the loss is, so that their difference is the loss without it.
        step.loss.metrics = {**step.loss.metrics, "penalty": penalty.detach()}

    def on_grads_ready(self, ctx: Context, step: Step) -> None:
        if self._value is None:
            return  # it is in the gradients already
        self._value = None
        now = self._now(ctx)
        if [*map(id, now)] != [*map(id, self._counted)] or _versions(now) != self._began:
            raise ConfigError(
                "parameters were changed, frozen or thawed in on_step_start after L1L2Penalty had "
                "looked at them: put it after that callback in the list"
            )
        ctx.gradients()  # normalised from here on
        with torch.no_grad():
            for p in now:
                if p.grad is not None:
                    grad, weights = own_part(p.grad), own_part(p)
                    if self._l1:
                        grad.add_(weights.sign(), alpha=self._l1)
                    if self._l2:
                        grad.add_(weights, alpha=2 * self._l2)

    def _now(self, ctx: Context) -> list[nn.Parameter]:
        """Returns what counts. Asked each time: a hook may freeze, replace or add some."""
        named = named_parameters(ctx.model)
        return [p for name, p in named if p.requires_grad and self._chosen(name, p)]

    def _of(self, weights: Sequence[Tensor], penalty: Tensor) -> Tensor:
        """Returns what the weights add to a penalty."""
        for one in weights:
            if self._l1:
                penalty = penalty + self._l1 * one.abs().sum()
            if self._l2:
                real = torch.view_as_real(one) if one.is_complex() else one
                penalty = penalty + self._l2 * real.square().sum()
        return penalty


def _versions(params: list[nn.Parameter]) -> list[int]:
    return [own_part(p)._version for p in params]
