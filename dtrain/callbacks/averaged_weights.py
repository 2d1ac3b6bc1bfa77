"""Averages of the weights, which count in place of the model's own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtrain.callback import Callback
from dtrain.context import Context
from dtrain.distributed import named_parameters, plain_name


class AveragedWeights(Callback):
    """What averages of the parameters share, whatever their formula.

    Parameters that require a gradient are averaged, in float32 at least. While one is frozen, it
    is what it is: its average begins later. That of one that was replaced begins anew.
    """

    def __init__(self) -> None:
        self.averages: dict[str, Tensor] = {}  # by the parameter's name
        self._params: list[Tensor] = []  # in the order of `averages`; none if these were loaded
        self._taken = 0  # the context's count when these were looked up

    def _begin(self, ctx: Context) -> None:
        """Begins an average of every parameter that requires a gradient and has none yet."""
        named = dict(named_parameters(ctx.model))
        then = dict(zip(self.averages, self._params, strict=False))
        for name in [n for n in self.averages if n not in named]:
            del self.averages[name]
        for name, p in named.items():
            replaced = then.get(name, p) is not p
            if replaced or (p.requires_grad and name not in self.averages):
                wide = torch.promote_types(p.dtype, torch.float32)
                self.averages[name] = p.detach().to(wide, copy=True)
        self._params = [named[name] for name in self.averages]
        for name, average in self.averages.items():
            self.averages[name] = average.to(named[name].device)  # from a checkpoint: the CPU
        self._taken = ctx._taken

    def _average(self, formula: Callable[[Any, Any, Any], None], count: int) -> None:
        """Averages by one of torch's formulas, which is told how often that was done before."""
        averages = list(self.averages.values())
        current = [p.detach().to(a.dtype) for p, a in zip(self._params, averages, strict=True)]
        formula(averages, current, count)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages = {plain_name(name): t for name, t in state["averages"].items()}
        self._params = []
