"""Brings batches to the device: to an accelerator packed in pinned memory, in one copy.

The host goes on; a large copy runs beside what the device still computes for the step before.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from operator import attrgetter, is_
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor

from dtrain import accelerator
from dtrain.data.order import Indices
from dtrain.data.packing import Bytes, Layout, Ring, kind_of, layout_of
from dtrain.distributed import raw_bytes

_IS_CPU = attrgetter("is_cpu")
#: From so many elements on torch has several threads gather rows. Up to so many bytes one does it
#: sooner than the others are woken (on two cores, 128 rows of 784 numbers: 40 microseconds, and
#: milliseconds where something else runs beside).
_OF_SEVERAL, _BY_ONE = 2**15, 2**20


class Shipper:
    """A feed's way to its device. Ranks: all, local."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._accelerator = device, accelerator.of(device)
        self._ring = None if self._accelerator is None else Ring(self._accelerator)
        self._table: _Table | None = None
        self.gathers = self._ring is not None  # rows of arrays, by `gather`
        self.keeps = not self.gathers and device.type == "cpu"  # the host's tensors as they are

    def ship(self, batch: Any) -> Any:
        """Returns a batch on the device; on an accelerator it may still be on its way.

        So are the host's tensors in lists, tuples, dicts and dataclasses. What else there is goes
        as accelerate sends it, and is waited for.
        """
        if self._ring is None:
            kind = type(batch)
            has_tensors_only = (kind is tuple or kind is list) and {*map(type, batch)} == {Tensor}
            if has_tensors_only and self.keeps and all(map(_IS_CPU, batch)):
                return kind(batch)  # most batches of the CPU; each step takes 2 microseconds less
            return mapped(batch, self._sent)
        found: list[Tensor] = []
        mapped(batch, lambda part: found.append(part) if self._is_of_host(part) else None)
        copies = iter(self._ring.copies(found) if found else ())
        return mapped(
            batch, lambda part: next(copies) if self._is_of_host(part) else self._sent(part)
        )

    def holds(self, part: Any) -> bool:
        """Says whether it is a plain tensor that lies on the device, which is an accelerator."""
        return self._accelerator is not None and _is_plain(part) and self._accelerator.holds(part)

    def _is_of_host(self, part: Any) -> bool:
        # The copy of one that requires a gradient must pass that on.
        return _is_plain(part) and part.is_cpu and not (part.requires_grad or self.holds(part))

    def _sent(self, part: Any) -> Any:
        return part if self.holds(part) else send_to_device(part, self._device, non_blocking=True)

    def gather(self, columns: Sequence[Any], rows: Any) -> list[Tensor] | None:
        """Returns rows of arrays, on the device; None where that cannot be done at once.

        Columns that lie there are indexed there. Rows that are a tensor do, too.
        """
        assert self._ring is not None
        if self._table is None or not self._table.is_of(columns):
            self._table = _Table(columns, self.holds)
        table = self._table
        if not table.fits:
            return None
        if isinstance(rows, Tensor) and not table.of_host:
            return [column.index_select(0, rows) for column in table.on_device]
        # A tensor on the device, where the columns were replaced since.
        is_array = isinstance(rows, np.ndarray)
        chosen = torch.from_numpy(rows) if is_array else torch.as_tensor(rows, device="cpu")
        if table.on_device and int(chosen.min()) < 0:
            return None
        layout = table.layout(len(chosen))
        places = self._ring.pack(layout)
        by_one = None
        if is_array and _OF_SEVERAL <= layout.bytes < _BY_ONE:
            by_one = table.bytes(rows)
        if by_one is not None:
            for whole, part in zip(by_one, self._ring.rows(layout), strict=False):
                np.take(whole, rows, 0, out=part, mode="clip")  # "raise" would go by a buffer
        else:
            try:
                for column, place in zip(table.of_host, places, strict=False):
                    torch.index_select(column, 0, chosen, out=place)
            except (IndexError, RuntimeError):
                return None  # it does not count from the end, nor know all dtypes
        if not table.on_device:
            return self._ring.send(layout)
        places[-1].copy_(chosen)
        *copies, rows = self._ring.send(layout)
        return table.in_order(copies, [column.index_select(0, rows) for column in table.on_device])

    def send_rows(self, rows: Indices) -> Tensor:
        """Returns the numbers of rows on the device, an accelerator."""
        sent: Tensor = self.ship(torch.as_tensor(rows, device="cpu"))
        return sent


class _Table:
    """The columns of a dataset as tensors, of which rows are gathered."""

    def __init__(self, columns: Sequence[Any], holds: Callable[[Any], bool]) -> None:
        self._columns, self._shapes = columns, [*map(_shape_of, columns)]
        tensors = [*map(_as_tensor, columns)]
        self._held = [*map(holds, tensors)]
        self.on_device = [one for one, held in zip(tensors, self._held, strict=True) if held]
        self.of_host = [one for one, held in zip(tensors, self._held, strict=True) if not held]
        self.fits = all(_is_plain(one) and one.is_cpu for one in self.of_host)
        self._layouts: dict[int, Layout] = {}
        self._bytes = [*map(_bytes_of, self.of_host)] if self.fits else []
        self._begins = [*map(Tensor.data_ptr, self.of_host)] if self.fits else []

    def is_of(self, columns: Sequence[Any]) -> bool:
        """Says whether it is still of these columns, which may be replaced at any time."""
        return (
            len(columns) == len(self._columns)
            and all(map(is_, columns, self._columns))
            and [*map(_shape_of, columns)] == self._shapes
        )

    def layout(self, rows: int) -> Layout:
        """Returns where so many rows of the host's columns lie, and the rows' numbers if needed."""
        if rows not in self._layouts:
            of_host = [(one.dtype, (rows, *one.shape[1:])) for one in self.of_host]
            kinds = [*of_host, (torch.int64, (rows,))] if self.on_device else of_host
            of_meta = (torch.empty(shape, dtype=dtype, device="meta") for dtype, shape in kinds)
            self._layouts[rows] = layout_of(tuple(map(kind_of, of_meta)))
        return self._layouts[rows]

    def bytes(self, rows: np.ndarray[Any, Any]) -> list[Bytes] | None:
        """Returns the host's columns as bytes, row by row; None where rows are not to be had so."""
        if not all(one is not None for one in self._bytes) or not len(rows):
            return None
        if [*map(Tensor.data_ptr, self.of_host)] != self._begins:  # `column.data = ...`
            return None
        least = min(map(len, self.of_host), default=0)
        return None if rows.min() < 0 or rows.max() >= least else self._bytes  # type: ignore[return-value]

    def in_order(self, of_host: Iterable[Tensor], on_device: Iterable[Tensor]) -> list[Tensor]:
        """Returns what was gathered of the columns, in their order."""
        here, there = iter(of_host), iter(on_device)
        return [next(there if held else here) for held in self._held]


def _bytes_of(column: Tensor) -> Bytes | None:
    """Returns a tensor's bytes, row by row; None where rows are not whole pieces of memory."""
    odd = column.requires_grad or column.is_conj() or column.is_neg()
    if odd or not column.dim() or not column.numel() or not column.is_contiguous():
        return None
    found: Bytes = raw_bytes(column).numpy().reshape(len(column), -1)
    return found


def _shape_of(column: Any) -> Any:
    return getattr(column, "shape", None)  # a list has none


def _as_tensor(column: Any) -> Any:
    """Returns an array as a tensor of the same memory; None where it cannot be one."""
    if isinstance(column, Tensor) or not is_numeric(column):
        return column
    with warnings.catch_warnings(), suppress(TypeError, ValueError):
        warnings.simplefilter("ignore")  # nobody writes to what may only be read
        return torch.from_numpy(column)
    return None


def is_numeric(column: Any) -> bool:
    """Says whether torch reads an array as it is: no text, no objects, no foreign dtype."""
    return (
        isinstance(column, np.ndarray)
        and column.dtype.kind in "biufc"
        and column.dtype.isnative
        and column.dtype != np.uint64
    )


def _is_plain(part: Any) -> bool:
    return (
        type(part) is Tensor
        and part.layout is torch.strided
        and not (part.is_nested or part.is_quantized)
    )


def mapped(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Returns a batch with ``function`` of each part, in lists, tuples, dicts and dataclasses."""
    kind = type(batch)
    if kind is list or kind is tuple:
        return kind([mapped(part, function) for part in batch])
    if kind is dict:
        return {name: mapped(part, function) for name, part in batch.items()}
    if not is_dataclass(batch) or isinstance(batch, Mapping) or hasattr(batch, "to"):
        return function(batch)
    made = copy.copy(batch)
    for field in fields(batch):
        if hasattr(batch, field.name):
            part = mapped(getattr(batch, field.name), function)
            object.__setattr__(made, field.name, part)  # it may be frozen
    return made
