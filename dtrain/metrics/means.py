"""Weighted means that are summed locally and agreed in one packed reduction."""

import math
from collections.abc import Mapping, Sequence
from numbers import Complex, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dtrain.context import Mean, Number, Reduce, on_device
from dtrain.distributed import Comm
from dtrain.errors import LossError
from dtrain.metrics.objects import Objects, is_metric

if TYPE_CHECKING:
    from torchmetrics import Metric

_OF_NUMPY = (np.ndarray, np.generic)
_NUMBERS = (Tensor, Complex, *_OF_NUMPY)


class Means:
    """Named metrics over micro-batches and, once agreed, over ranks.

    Nothing is read from the ``device``, where metrics are computed, before :meth:`agree`, which
    ``label`` names for the other ranks. ``names`` all ranks have, and need not agree on them.
    """

    def __init__(self, label: str, device: torch.device, names: Sequence[str] = ()) -> None:
        self._label = label
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._sums: dict[str, list[float]] = {}
        self._device_sums: dict[str, Tensor] = {}
        self._reduce: dict[str, Reduce] = {}
        self._objects = Objects(label)
        self._names = list(names)  # agreed

    def add(self, name: str, value: "Number | Mean | Metric", weight: Number) -> None:
        """Adds a mean over ``weight`` units; or a :class:`Mean` or torchmetrics object, without.

        A value with weight 0 counts for nothing, even if it is NaN.
        """
        if isinstance(value, Mean):
            total, units = _number(name, value.total), _number(name, value.weight)
        elif isinstance(value, _NUMBERS):
            mean, units = _number(name, value), _number(name, weight)
            if isinstance(mean, Tensor) and mean.dtype not in (torch.float32, torch.float64):
                mean = mean.double()  # its own type may end at 255, or at 65504
            total = mean * units
        else:
            self._add_object(name, value)
            return
        if self._on_cpu or not (isinstance(total, Tensor) or isinstance(units, Tensor)):
            pair = self._sums.setdefault(name, [0.0, 0.0])
            units = float(units)
            if units != 0:
                pair[0] += float(total.detach() if isinstance(total, Tensor) else total)
                pair[1] += units
            return
        both = torch.stack([self._as_double(total), self._as_double(units)])
        both = torch.where(both[1] == 0, torch.zeros_like(both), both)
        seen = self._device_sums.get(name)
        self._device_sums[name] = both if seen is None else seen + both

    def add_logged(self, name: str, values: list[Number], reduce: Reduce) -> None:
        """Adds what was logged under a name since the last sync point."""
        self._reduce[name] = reduce
        values = [_number(name, value) for value in values]
        if reduce == "last":
            values = values[-1:]
        if reduce == "max":
            values = [torch.stack([self._as_double(value) for value in values]).max()]
        if self._on_cpu or not any(isinstance(value, Tensor) for value in values):
            total: Number = sum(map(float, values))
        else:
            total = torch.stack([self._as_double(value) for value in values]).sum()
        self.add(name, Mean(total, len(values)), 1)

    def _as_double(self, value: Number) -> Tensor:
        return on_device(value, torch.float64, self._device)

    def _add_object(self, name: str, value: Any) -> None:
        parts = value.items() if hasattr(value, "items") else [("", value)]
        for key, part in parts:  # a MetricCollection is several
            if not is_metric(part):
                raise LossError(
                    f"metric {name!r} is {part!r}; a metric is a number, a 0-dim tensor, "
                    "dtrain.Mean(total, weight) or a torchmetrics object"
                )
            self._objects.seen[f"{name}/{key}" if key else name] = part

    def drop(self) -> None:
        """Forgets what was added and not agreed, as after a failure."""
        self._sums, self._device_sums = {}, {}
        self._objects.drop()

    def agree(self, comm: Comm) -> dict[str, float]:
        """Returns each metric over all ranks, in the order of first use, and starts anew.

        A rank that had no data, or did not report a name, contributes nothing to it. Ranks: all,
        communicates: one packed reduction; an exchange when a name is new, one for maxima, and one
        for states of torchmetrics objects that are no sums, where there are any.
        """
        sums = self._sums
        _add_to(sums, {name: pair.tolist() for name, pair in self._device_sums.items()})
        self._sums, self._device_sums = {}, {}
        maxima = {name: sums.pop(name)[0] for name in [*sums] if self._reduce.get(name) == "max"}
        # Names are agreed once; after that a sync point is one packed reduction, which also
        # says whether some rank has a name that the others have not seen.
        new = {name: pair for name, pair in sums.items() if name not in self._names}
        states, new_objects, unsummed = self._objects.collect()
        known = [number for name in self._names for number in sums.get(name, (0.0, 0.0))]
        flags = [bool(new or new_objects), bool(maxima), unsummed, True]
        figures = torch.tensor([*flags, *known], dtype=torch.float64)
        packed = comm.all_reduce(f"{self._label}: sums", torch.cat([figures, states]))
        any_new, any_maxima, any_unsummed, ranks = map(int, packed[:4].tolist())
        pairs = packed[4 : len(figures)].view(-1, 2).tolist()
        agreed = dict(zip(self._names, pairs, strict=True))
        news: list[dict[str, Any]] = []
        if any_new:
            kinds = {name: self._reduce.get(name, "mean") for name in new}
            everyones = comm.gather_objects(f"{self._label}: new names", (new, kinds, new_objects))
            for theirs, how, objects in everyones:
                self._reduce = how | self._reduce
                news.append(objects)
                _add_to(agreed, theirs)
            self._names = list(agreed)
        values = {
            name: total if self._reduce.get(name) == "sum" else total / weight
            for name, (total, weight) in agreed.items()
            if weight
        }
        if any_maxima:
            largest: dict[str, float] = {}
            for found in comm.gather_objects(f"{self._label}: maxima", maxima):
                largest |= {n: max(value, largest.get(n, value)) for n, value in found.items()}
            values |= largest
        states, unsummed = packed[len(figures) :], bool(any_unsummed)
        return values | self._objects.agree(comm, states, news, exchange=unsummed, ranks=ranks)


def as_metrics(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns ``metrics`` if it is a mapping from names to numbers."""
    if not isinstance(metrics, Mapping):
        raise LossError(
            f"Loss(metrics=...) must be a dict from name to number, not {type(metrics).__name__}"
        )
    return metrics


def _add_to(sums: dict[str, list[float]], more: Mapping[str, Sequence[float]]) -> None:
    for name, (total, weight) in more.items():
        pair = sums.setdefault(name, [0.0, 0.0])
        pair[0] += total
        pair[1] += weight


def _number(name: str, value: object) -> Number:
    """Returns the one real number that a metric must be; else raises LossError."""
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return value
    elif isinstance(value, _OF_NUMPY) and value.size == 1:
        value = value.item()
    if isinstance(value, Real):
        return float(value)
    shape = getattr(value, "shape", ())
    if math.prod(shape) != 1:
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        raise LossError(
            f"metric {name!r} is {kind} of shape {list(shape)}; a metric is one number: average "
            "it, or return it in Loss(outputs=...)"
        )
    raise LossError(
        f"metric {name!r} is {value!r}; a metric is a real number or a 0-dim tensor of one"
    )
