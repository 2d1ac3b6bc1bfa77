"""Weighted means that are summed locally and agreed in one packed reduction."""

import math
from collections.abc import Mapping, Sequence
from numbers import Complex, Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dtrain import accelerator
from dtrain.context import Mean, Number, Reduce, on_device
from dtrain.distributed import Comm
from dtrain.errors import ConfigError, LossError, RankMismatch
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

    def __init__(
        self,
        label: str,
        device: torch.device,
        names: Sequence[str] = (),
        *,
        counts: bool = True,
    ) -> None:
        self._label, self._counts = label, counts  # False where another rank has the same samples
        self._device = device
        self._on_cpu = accelerator.of(device) is None
        self._sums: dict[str, list[float]] = {}
        self._device_sums: dict[str, Tensor] = {}
        self._kinds: dict[str, Reduce] = {}  # how each name is reduced; agreed
        self._new_kinds: dict[str, Reduce] = {}
        self._objects = Objects(label)
        self._told: set[str] = set()  # names of objects without an update
        self._names = list(names)  # agreed
        self.pairs: dict[str, list[float]] = {}  # of the newest agreed means: totals and weights
        #: What all ranks had ``asked`` for in the last agreement. Agreed.
        self.asked = 0
        #: Whether the last agreement's ``mark`` was not equal on all ranks. Agreed.
        self.parted = False

    def add(self, name: str, value: "Number | Mean | Metric", weight: Number) -> None:
        """Adds a mean over ``weight`` units; or a :class:`Mean` or torchmetrics object, without.

        A value with weight 0 counts for nothing, even if it is NaN.
        """
        if isinstance(value, Mean):
            total, units = number_of(name, value.total), number_of(name, value.weight)
        elif isinstance(value, _NUMBERS):
            mean, units = number_of(name, value), number_of(name, weight)
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
        if name in self._sums or name in self._device_sums or name in self._objects.seen:
            raise LossError(
                f"{name!r} is logged by a callback and is a metric of the loss function"
            )
        before = self._kinds.get(name) or self._new_kinds.setdefault(name, reduce)
        if before != reduce:
            raise ConfigError(f"log({name!r}, reduce={reduce!r}): it was {before!r} before")
        values = [number_of(name, value) for value in values]
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
            label = f"{name}/{key}" if key else name
            if self._objects.seen.setdefault(label, part) is not part:
                raise LossError(
                    f"the metric {label!r} is another torchmetrics object than in the batch "
                    "before: of objects made anew in each batch only the last batch would be "
                    "reported. Make it once, outside of the loss function; there, update it and "
                    "hand over the object itself: Loss(..., metrics={'f1': f1})"
                )

    def shares_with(self, other: "Means") -> list[str]:
        """Returns the names of torchmetrics objects that ``other`` has not agreed yet, too."""
        theirs = [*map(id, other._objects.seen.values())]
        return [name for name, metric in self._objects.seen.items() if id(metric) in theirs]

    def missed(self) -> str:
        """Returns what to tell the user, once, of objects of which the last agreement had none."""
        new = [name for name in self._objects.idle if name not in self._told]
        self._told |= {*new}
        if not new:
            return ""
        return (
            f"warning: no rank had updated the torchmetrics object {', '.join(new)}, so there was "
            "no figure of it: call its update(...) in the loss function, before it is handed over. "
            "(A Running one keeps nothing that ranks could share: hand over what it wraps.)"
        )

    def drop(self) -> None:
        """Forgets what was added and not agreed, as after a failure."""
        self._sums, self._device_sums, self._new_kinds = {}, {}, {}
        self._objects.drop()

    def agree(self, comm: Comm, mark: int = 0, asked: int = 0) -> dict[str, float]:
        """Returns each metric over all ranks, in the order of first use, and starts anew.

        In passing ``mark``, of 16 bits, is compared between ranks, and ``asked`` is added up.

        A rank that had no data, or did not report a name, contributes nothing to it. Ranks: all,
        communicates: one packed reduction; an exchange when a name is new, one for maxima, and one
        for states of torchmetrics objects that are no sums, where there are any.
        """
        if not self._counts:
            self.drop()
        sums = self._sums
        _add_to(sums, {name: pair.tolist() for name, pair in self._device_sums.items()})
        self._sums, self._device_sums = {}, {}
        how = self._kinds | self._new_kinds
        maxima = {name: sums.pop(name)[0] for name in [*sums] if how.get(name) == "max"}
        # Names are agreed once; after that a sync point is one packed reduction, which also
        # says whether some rank has a name that the others have not seen.
        new = {name: pair for name, pair in sums.items() if name not in self._names}
        states, new_objects, unsummed = self._objects.collect()
        known = [number for name in self._names for number in sums.get(name, (0.0, 0.0))]
        kinds = {n: how.get(n, "mean") for n in [*new, *maxima] if n not in self._kinds}
        flags = [bool(kinds or new_objects), bool(maxima), unsummed, True, asked, mark, mark * mark]
        figures = torch.tensor([*flags, *known], dtype=torch.float64)
        packed = comm.all_reduce(f"{self._label}: sums", torch.cat([figures, states]))
        told = map(int, packed[: len(flags)].tolist())
        any_new, any_maxima, any_unsummed, ranks, self.asked, *marks = told
        # By Cauchy and Schwarz only where all are equal; all ranks compute it from the same sums.
        self.parted = ranks * marks[1] != marks[0] ** 2
        pairs = packed[len(flags) : len(figures)].view(-1, 2).tolist()
        agreed = dict(zip(self._names, pairs, strict=True))
        news: list[dict[str, Any]] = []
        if any_new:
            everyones = comm.gather_objects(f"{self._label}: new names", (new, kinds, new_objects))
            self._agree_kinds([theirs for _, theirs, _ in everyones])
            for theirs, _, objects in everyones:
                news.append(objects)
                _add_to(agreed, theirs)
            self._names = list(agreed)
        self.pairs = {n: p for n, p in agreed.items() if self._kinds.get(n, "mean") == "mean"}
        values = {
            name: total if self._kinds.get(name) == "sum" else total / weight
            for name, (total, weight) in agreed.items()
            if weight
        }
        if any_maxima:
            largest: dict[str, float] = {}
            for found in comm.gather_objects(f"{self._label}: maxima", maxima):
                for name, value in found.items():
                    seen = largest.get(name)
                    if seen is None or value > seen or math.isnan(value):  # NaN wins, and stays
                        largest[name] = value
            values |= largest
        states, unsummed = packed[len(figures) :], bool(any_unsummed)
        return values | self._objects.agree(comm, states, news, exchange=unsummed, ranks=ranks)

    def _agree_kinds(self, everyones: list[dict[str, Reduce]]) -> None:
        """Takes how each rank reduces what is new; raises RankMismatch where they differ."""
        for name in {name: None for kinds in everyones for name in kinds}:
            said = {rank: kinds[name] for rank, kinds in enumerate(everyones) if name in kinds}
            before = self._kinds.get(name)
            if len({*said.values()} | ({before} - {None})) > 1:
                table = ", ".join(f"{kind!r} on rank {rank}" for rank, kind in said.items())
                raise RankMismatch(
                    f"ctx.log({name!r}): the ranks reduce it differently: {table}"
                    + (f", {before!r} before" if before else "")
                    + "; log it alike on all ranks, or under another name"
                )
            self._kinds[name] = next(iter(said.values()))
        self._new_kinds = {}


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


def number_of(name: str, value: object) -> Number:
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
