"""Averages of the weights, which count in place of the model's own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dtrain.callback import Callback
from dtrain.context import Context
from dtrain.distributed import is_sharded, named_parameters, own_part, placed_like, plain_name


class AveragedWeights(Callback):
    """What averages of the parameters share, whatever their formula.

    Parameters that require a gradient are averaged, in float32 at least. While one is frozen, it
    is what it is: its average begins later. That of one that was replaced begins anew. Where they
    are sharded, so are their averages.
    """

    def __init__(self) -> None:
        self.averages: dict[str, Tensor] = {}  # by the parameter's name
        self._params: list[Tensor] = []  # in the order of `averages`; none if these were loaded
        self._sharded = False
        self._taken = 0  # how often the context had been given others by then
        self._equal: set[Tensor] = set()  # what is equal on all ranks by now, as new ones are not

    def on_fit_start(self, ctx: Context) -> None:
        self._equal = {*ctx.model.parameters()}  # by the end of the fit's start

    def _begin(self, ctx: Context) -> None:
        """Begins an average of every parameter that requires a gradient and has none yet.

        Those of parameters that are gone or were replaced are dropped. One that a hook has just
        made may differ between ranks: its average begins after its first step.
        """
        named = dict(named_parameters(ctx.model))
        then = dict(zip(self.averages, self._params, strict=False))
        for name, average in [*self.averages.items()]:
            now = named.get(name)
            if now is None or now.shape != average.shape or then.get(name, now) is not now:
                del self.averages[name]
        for name, p in named.items():
            if p.requires_grad and name not in self.averages and p in self._equal:
                wide = torch.promote_types(p.dtype, torch.float32)
                self.averages[name] = p.detach().to(wide, copy=True)
        self._params = [named[name] for name in self.averages]
        self._sharded = any(is_sharded(p) for p in self._params)
        for name, average in self.averages.items():
            # From a checkpoint it is whole, and on the CPU.
            self.averages[name] = placed_like(average.to(named[name].device), named[name])

    def _follow(self, ctx: Context) -> None:
        """After a step before which hooks thawed, replaced or added some, which it made equal."""
        self._taken, self._equal = ctx._taken, {*ctx.model.parameters()}
        self._begin(ctx)

    def _average(self, formula: Callable[[Any, Any, Any], None], count: int) -> None:
        """Averages by one of torch's formulas, which is told how often that was done before."""
        with torch.no_grad():
            params, averages = self._params, [*self.averages.values()]
            if self._sharded:  # else a step is not to pay for it
                params, averages = [*map(own_part, params)], [*map(own_part, averages)]
            pairs = zip(params, averages, strict=True)
            current = [p if p.dtype is a.dtype else p.to(a.dtype) for p, a in pairs]
            formula(averages, current, count)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages = {plain_name(name): t for name, t in state["averages"].items()}
        self._params = []
