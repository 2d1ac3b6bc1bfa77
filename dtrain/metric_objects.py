"""torchmetrics objects: each rank updates its own, all get the value over all ranks' data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dtrain.comm import Comm
from dtrain.errors import LossError

Gather = Callable[..., list[Tensor]]


@runtime_checkable
class MetricObject(Protocol):
    """What dtrain needs of a ``torchmetrics.Metric``."""

    update_called: bool
    dist_sync_fn: Gather | None
    distributed_available_fn: Callable[[], bool] | None

    def compute(self) -> Any:
        """Returns the metric's value."""
        ...

    def reset(self) -> None:
        """Forgets all updates."""
        ...

    def sync(
        self, dist_sync_fn: Gather | None = None, *, distributed_available: Callable[[], bool]
    ) -> None:
        """Merges other ranks' states into this one's."""
        ...

    def unsync(self) -> None:
        """Takes a merge back."""
        ...


def agree(metrics: Mapping[str, MetricObject], label: str, comm: Comm) -> dict[str, float]:
    """Returns each metric's value over all ranks' updates, and resets it.

    All states of all metrics travel in one exchange. Merging is torchmetrics' own; it is only
    handed the other ranks' states in place of a collective per state. A rank that updated
    nothing, or never saw the metric, gets the value all the same.

    Args:
        metrics: by name; the same names need not be there on all ranks.
        label: names the exchange.
        comm: to the other ranks.

    Raises:
        LossError: a value is not a number or a dict of numbers.

    Ranks: all, communicates.
    """
    mine = {name: _states(metric) for name, metric in metrics.items() if metric.update_called}
    everyones = comm.gather_objects(f"{label}: metric states", mine)
    names = list(dict.fromkeys(name for states in everyones for name in states))
    values: dict[str, float] = {}
    for name in names:
        if name in mine:
            states = [theirs[name] for theirs in everyones if name in theirs]
            values |= _flatten(name, _compute(metrics[name], states))
    for metric in metrics.values():
        metric.reset()
    if all(name in states for name in names for states in everyones):
        return values
    agreed: dict[str, float] = {}
    for theirs in comm.gather_objects(f"{label}: metric values", values):
        agreed |= {name: value for name, value in theirs.items() if name not in agreed}
    return agreed


def _states(metric: MetricObject) -> list[Tensor]:
    """Returns the metric's states, in the order in which it would send them."""
    states: list[Tensor] = []

    def record(state: Tensor, group: object = None) -> list[Tensor]:
        states.append(state.detach().cpu())
        return [state]

    metric.sync(record, distributed_available=lambda: True)
    metric.unsync()
    return states


def _compute(metric: MetricObject, everyones: list[list[Tensor]]) -> Any:
    """Computes with all ranks' states, by rank, as if they had come from a collective."""
    number = 0

    def hand_over(state: Tensor, group: object = None) -> list[Tensor]:
        nonlocal number
        number += 1
        return [states[number - 1].to(state.device) for states in everyones]

    before = metric.dist_sync_fn, metric.distributed_available_fn
    metric.dist_sync_fn, metric.distributed_available_fn = hand_over, lambda: True
    try:
        return metric.compute()
    finally:
        metric.dist_sync_fn, metric.distributed_available_fn = before


def _flatten(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, Mapping):
        return {f"{name}/{key}": float(one) for key, one in value.items()}
    if isinstance(value, Tensor) and value.numel() != 1:
        raise LossError(
            f"the metric {name!r} computes a tensor of shape {list(value.shape)}; sinks take "
            "numbers: choose an average (`average='macro'`)"
        )
    return {name: float(torch.as_tensor(value))}
