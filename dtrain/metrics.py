"""Weighted means that are summed locally and agreed in one packed reduction."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from dtrain.comm import Comm
from dtrain.errors import LossError
from dtrain.state import Mean, Number


class Means:
    """Named weighted means over micro-batches and, once agreed, over ranks.

    Nothing is read from the device before :meth:`agree`.

    Args:
        label: names the reduction for the other ranks.
        device: where metrics are computed.
    """

    def __init__(self, label: str, device: torch.device) -> None:
        self._label = label
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._sums: dict[str, list[float]] = {}
        self._device_sums: dict[str, Tensor] = {}
        self._names: list[str] = []

    def add(self, name: str, value: Number | Mean, weight: Number) -> None:
        """Adds a mean over ``weight`` units, or a :class:`Mean`, which has its own.

        A value with weight 0 counts for nothing, even if it is NaN.

        Raises:
            LossError: the value is no number.

        Ranks: all, local.
        """
        if isinstance(value, Mean):
            total, units = value.total, value.weight
        else:
            _check_number(name, value)
            units = weight
            total = value * weight
        _check_number(name, total)
        _check_number(name, units)
        if self._on_cpu:
            pair = self._sums.setdefault(name, [0.0, 0.0])
            units = float(units)
            if units != 0:
                pair[0] += float(total)
                pair[1] += units
            return
        both = torch.stack(
            [
                torch.as_tensor(x, dtype=torch.float64, device=self._device).detach()
                for x in (total, units)
            ]
        )
        both = torch.where(both[1] == 0, torch.zeros_like(both), both)
        seen = self._device_sums.get(name)
        self._device_sums[name] = both if seen is None else seen + both

    def agree(self, comm: Comm) -> dict[str, float]:
        """Returns each mean over all ranks, in the order of first use, and starts anew.

        A rank that had no data, or did not report a name, contributes nothing to it.

        Ranks: all, communicates: one packed reduction, and an exchange when a name is new.
        """
        sums = {name: tuple(pair) for name, pair in self._sums.items()}
        sums |= {name: tuple(pair.tolist()) for name, pair in self._device_sums.items()}
        self._sums, self._device_sums = {}, {}
        # Names are agreed once; after that a sync point is one packed reduction, which also
        # says whether some rank has a name that the others have not seen.
        new = {name: pair for name, pair in sums.items() if name not in self._names}
        known = [sums.get(name, (0.0, 0.0)) for name in self._names]
        packed = torch.tensor([(float(bool(new)), 0.0), *known], dtype=torch.float64)
        rows = comm.all_reduce(f"{self._label}: sums", packed).tolist()
        agreed = dict(zip(self._names, rows[1:], strict=True))
        if rows[0][0]:
            for theirs in comm.gather_objects(f"{self._label}: new names", new):
                for name, (total, weight) in theirs.items():
                    seen = agreed.setdefault(name, [0.0, 0.0])
                    seen[0] += total
                    seen[1] += weight
            self._names = list(agreed)
        return {name: total / weight for name, (total, weight) in agreed.items() if weight}


def as_metrics(metrics: Mapping[str, Number | Mean]) -> Mapping[str, Number | Mean]:
    """Returns ``metrics`` if it is a mapping from names to numbers.

    Raises:
        LossError: it is something else.
    """
    if not isinstance(metrics, Mapping):
        raise LossError(
            f"Loss(metrics=...) must be a dict from name to number, not {type(metrics).__name__}"
        )
    return metrics


def _check_number(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise LossError(
                f"metric {name!r} is a tensor of shape {list(value.shape)}; a metric is one "
                "number: average it, or return it in Loss(outputs=...)"
            )
    elif not isinstance(value, Real):
        raise LossError(f"metric {name!r} is {value!r}; a metric is a number or a 0-dim tensor")
