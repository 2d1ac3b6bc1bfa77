"""torchmetrics objects: each rank updates its own, all get the value over all ranks' data."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from dtrain.distributed import Comm
from dtrain.errors import LossError

if TYPE_CHECKING:
    from torchmetrics import Metric

State = Any  # a tensor, or a list of tensors (or, in detection, of tuples)


@dataclass(frozen=True, slots=True)
class StateKey:
    """A state that is summed over ranks: where it lies in a metric, and what it looks like."""

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


Sums = dict[StateKey, Tensor]  # in float64
Others = dict[str, dict[str, State]]  # states that are not summed, by path and by name


def is_metric(value: object) -> TypeGuard["Metric"]:
    """Says whether it is a torchmetrics object; who brings none need not have torchmetrics."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)


class Objects:
    """The torchmetrics objects of one set of metrics, from first use to agreement.

    States that torchmetrics sums travel in the packed reduction that :class:`~dtrain.metrics.Means`
    makes anyway, once their layout is agreed; all others (lists, maxima, custom ones) of all
    metrics travel in one exchange. They are merged as torchmetrics would; its own collectives,
    one for each state, are never called. Sums are made in float64: counts are exact to 2^53.
    """

    def __init__(self, label: str) -> None:
        self._label = label  # names the exchanges
        self.seen: dict[str, Metric] = {}  # handed over since the last agreement
        self.idle: list[str] = []  # of these, at the last one: those that no rank had updated
        self._others: dict[str, Others] = {}
        self._layouts: dict[str, tuple[StateKey, ...]] = {}  # agreed

    def drop(self) -> None:
        """Forgets what was not agreed."""
        for metric in self.seen.values():
            metric.reset()
        self.seen = {}

    def collect(self) -> tuple[Tensor, dict[str, Sums], bool]:
        """Returns the packed sums, those whose layout is new, and if some states are no sums."""
        sums: dict[str, Sums] = {}
        self._others = {}
        for name, metric in self.seen.items():
            if any(part.update_called for part in _parts(metric).values()):
                sums[name], self._others[name] = _states(metric)
        packed = [torch.zeros(0, dtype=torch.float64)]
        for name, layout in self._layouts.items():  # a 1 and the sums; or zeros
            fits = name in sums and tuple(sums[name]) == layout
            mine = sums.pop(name) if fits else {}
            packed.append(torch.tensor([float(fits)], dtype=torch.float64))
            for key in layout:
                total = mine[key] if fits else torch.zeros(key.shape, dtype=torch.float64)
                packed.append(total.reshape(-1))
        unsummed = any(any(states.values()) for states in self._others.values())
        return torch.cat(packed), sums, unsummed

    def agree(
        self, comm: Comm, packed: Tensor, news: list[dict[str, Sums]], *, exchange: bool, ranks: int
    ) -> dict[str, float]:
        """Returns each metric's value over all ranks' updates, and resets it.

        A rank that updated nothing, or never saw the metric, gets the value all the same.
        ``packed`` is the sum over ranks; ``news`` are every rank's sums that had no room in it.
        Ranks: all, communicates.
        """
        counts: dict[str, int] = {}  # how many ranks updated each metric, where any did
        totals: dict[str, Sums] = {}
        sizes = [n for keys in self._layouts.values() for n in (1, *(prod(k.shape) for k in keys))]
        parts = iter(packed.split(sizes))
        for name, layout in self._layouts.items():
            count = int(next(parts))
            sums = {key: next(parts).view(key.shape) for key in layout}
            if count:
                counts[name], totals[name] = count, sums
        for name, sums in (item for theirs in news for item in theirs.items()):
            totals[name] = _added(name, totals[name], sums) if name in totals else sums
            counts[name] = counts.get(name, 0) + 1
            self._layouts[name] = tuple(sums)
        everyones = f"{self._label}: metric states"
        others = comm.gather_objects(everyones, self._others) if exchange else []
        values: dict[str, float] = {}
        for name, sums in totals.items():
            if name in self.seen:
                theirs = [states[name] for states in others if name in states]
                values |= _flatten(name, _compute(self.seen[name], sums, theirs))
        self.idle = [name for name in self.seen if name not in totals]
        self.drop()
        if all(count == ranks for count in counts.values()):
            return values
        agreed: dict[str, float] = {}
        for found in comm.gather_objects(f"{self._label}: metric values", values):
            agreed |= {name: value for name, value in found.items() if name not in agreed}
        return agreed


def _added(name: str, sums: Sums, more: Sums) -> Sums:
    if tuple(sums) != tuple(more):
        shapes = [[list(key.shape) for key in each] for each in (sums, more)]
        raise LossError(
            f"the states of the metric {name!r} have the shapes {shapes[0]} on one rank and "
            f"{shapes[1]} on another: update it alike on all ranks"
        )
    return {key: total + more[key] for key, total in sums.items()}


def _parts(metric: "Metric") -> dict[str, "Metric"]:
    """The metric and those that it wraps or sums, by their place in it."""
    return {path: part for path, part in metric.named_modules() if is_metric(part)}


def _states(metric: "Metric") -> tuple[Sums, Others]:
    """Returns copies of the states that are summed, and of all others."""
    from torchmetrics.utilities import dim_zero_sum

    sums: Sums = {}
    others: Others = {}
    for path, part in _parts(metric).items():
        others[path] = {}
        for name, state in part.metric_state.items():
            is_summed = part._reductions[name] is dim_zero_sum
            if is_summed and isinstance(state, Tensor) and not state.is_complex():
                key = StateKey(path, name, tuple(state.shape), state.dtype)
                sums[key] = state.detach().cpu().double()
            else:
                others[path][name] = _moved(state, torch.device("cpu"))
    return sums, others


def _moved(state: State, device: torch.device) -> State:
    if isinstance(state, Tensor):
        return state.detach().to(device)
    return [_moved(one, device) if isinstance(one, Tensor) else one for one in state]


def _compute(metric: "Metric", sums: Sums, others: list[Others]) -> Any:
    """Computes with all ranks' states; to be followed by a reset."""
    parts = _parts(metric)
    before = {path: part.distributed_available_fn for path, part in parts.items()}
    summed = {(key.path, key.name): total.to(key.dtype) for key, total in sums.items()}
    try:
        for path, part in parts.items():
            part.distributed_available_fn = lambda: False  # merged here, not by a collective
            part._computed = None  # it may have been looked at: that value is of this rank only
            for name in part.metric_state:
                merged = summed.get((path, name))
                if merged is None:
                    merged = _merge([each[path][name] for each in others], part._reductions[name])
                setattr(part, name, _moved(merged, part.device))
        return metric.compute()
    finally:
        for path, part in parts.items():
            part.distributed_available_fn = before[path]


def _merge(states: list[State], reduction: Any) -> State:
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
