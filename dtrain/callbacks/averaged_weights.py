"""Averages of the weights, which take the weights' place in the model for a while."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.callback import Callback
from dtrain.context import Context


class AveragedWeights(Callback):
    """What averages of the parameters share, whatever their formula.

    Parameters that require a gradient are averaged, in float32 at least. While one is frozen, it
    is what it is: its average begins later.
    """

    def __init__(self) -> None:
        self.averages: dict[str, Tensor] = {}  # by the parameter's name
        self._params: list[Tensor] = []  # in the order of `averages`
        self._own: list[Tensor] = []  # the model's weights, while the averages are in it

    def on_fit_start(self, ctx: Context) -> None:
        self._take_out()  # if an earlier fit left them in

    def _begin(self, model: nn.Module) -> None:
        """Begins an average of every parameter that requires a gradient and has none yet."""
        for name, p in model.named_parameters():
            if p.requires_grad and name not in self.averages:
                wide = torch.promote_types(p.dtype, torch.float32)
                self.averages[name] = p.detach().to(wide, copy=True)
        self._find(model)

    def _find(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        self._params = [named[name] for name in self.averages]
        for name, p in zip(self.averages, self._params, strict=True):
            self.averages[name] = self.averages[name].to(p.device)  # from a checkpoint: the CPU

    def _average(self, formula: Callable[[Any, Any, Any], None], count: int) -> None:
        """Averages by one of torch's formulas, which is told how often that was done before."""
        averages = list(self.averages.values())
        current = [p.detach().to(a.dtype) for p, a in zip(self._params, averages, strict=True)]
        formula(averages, current, count)

    @torch.no_grad()
    def _put_in(self, model: nn.Module) -> None:
        self._find(model)
        self._own = [p.clone() for p in self._params]
        if self._own:
            torch._foreach_copy_(self._params, list(self.averages.values()))

    @torch.no_grad()
    def _take_out(self) -> None:
        """Gives the model its own weights back, bit for bit."""
        if self._own:
            torch._foreach_copy_(self._params, self._own)
        self._own = []
