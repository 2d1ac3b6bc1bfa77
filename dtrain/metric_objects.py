"""torchmetrics objects: each rank updates its own, all get the value over all ranks' data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dtrain.comm import Comm
from dtrain.errors import LossError

State = Any  # a tensor, or a list of tensors (or, in detection, of tuples)
States = dict[str, dict[str, State]]  # by the metric's place within the object, and by name


@runtime_checkable
class MetricObject(Protocol):
    """What dtrain needs of a ``torchmetrics.Metric``."""

    update_called: bool
    device: torch.device
    distributed_available_fn: Callable[[], bool] | None
    metric_state: dict[str, State]
    _computed: Any
    _reductions: dict[str, Callable[[Any], Any] | None]

    def compute(self) -> Any:
        """Returns the metric's value."""
        ...

    def reset(self) -> None:
        """Forgets all updates."""
        ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The metric itself and, in a wrapper or a sum of metrics, those inside it."""
        ...


def agree(metrics: Mapping[str, MetricObject], label: str, comm: Comm) -> dict[str, float]:
    """Returns each metric's value over all ranks' updates, and resets it.

    All states of all metrics travel in one exchange, and are merged as torchmetrics would; its
    own collectives, one for each state, are never called. A rank that updated nothing, or never
    saw the metric, gets the value all the same.

    Args:
        metrics: by name; the same names need not be there on all ranks.
        label: names the exchange.
        comm: to the other ranks.

    Raises:
        LossError: a value is not a number or a dict of numbers.

    Ranks: all, communicates.
    """
    mine = {name: _states(metric) for name, metric in metrics.items() if _was_updated(metric)}
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


def _parts(metric: MetricObject) -> dict[str, MetricObject]:
    """The metric and those that it wraps or sums, by their place in it."""
    return {path: part for path, part in metric.named_modules() if isinstance(part, MetricObject)}


def _was_updated(metric: MetricObject) -> bool:
    return any(part.update_called for part in _parts(metric).values())


def _states(metric: MetricObject) -> States:
    cpu = torch.device("cpu")
    return {
        path: {name: _moved(state, cpu) for name, state in part.metric_state.items()}
        for path, part in _parts(metric).items()
    }


def _moved(state: State, device: torch.device) -> State:
    if isinstance(state, Tensor):
        return state.detach().to(device)
    return [_moved(one, device) if isinstance(one, Tensor) else one for one in state]


def _compute(metric: MetricObject, everyones: list[States]) -> Any:
    """Computes with all ranks' states, by rank; to be followed by a reset."""
    parts = _parts(metric)
    before = {path: part.distributed_available_fn for path, part in parts.items()}
    try:
        for path, part in parts.items():
            part.distributed_available_fn = lambda: False  # merged here, not by a collective
            part._computed = None  # it may have been looked at: that value is of this rank only
            for name in part.metric_state:
                theirs = [states[path][name] for states in everyones]
                setattr(part, name, _moved(_merge(theirs, part._reductions[name]), part.device))
        return metric.compute()
    finally:
        for path, part in parts.items():
            part.distributed_available_fn = before[path]


def _merge(states: list[State], reduction: Callable[[Any], Any] | None) -> State:
    """As ``torchmetrics.Metric`` does after its collectives."""
    if isinstance(states[0], Tensor):
        stacked = torch.stack(states)
        return stacked if reduction is None else reduction(stacked)
    flat = [one for each in states for one in each]
    return flat if reduction is None or not flat else [reduction(flat)]


def _flatten(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, Mapping):
        flat: dict[str, float] = {}
        for key, one in value.items():
            flat |= _flatten(f"{name}/{key}", one)
        return flat
    if isinstance(value, Tensor) and value.numel() != 1:
        raise LossError(
            f"the metric {name!r} computes a tensor of shape {list(value.shape)}; sinks take "
            "numbers: choose an average (`average='macro'`)"
        )
    return {name: float(torch.as_tensor(value))}
