"""Datasets that are arrays: indexed whole, with the batch that collating samples would give."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset

from dtrain.data.order import Indices
from dtrain.errors import DataError


class Columns:
    """A map-style dataset of equally long arrays or tensors, in a dict or a tuple.

    A sample is a dict or a tuple of one row of each.

    Raises:
        DataError: they are not equally long.
    """

    def __init__(self, columns: Mapping[str, Any] | tuple[Any, ...]) -> None:
        named = dict(columns) if isinstance(columns, Mapping) else dict(enumerate(columns))
        lengths = {name: len(column) for name, column in named.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name!r} {length}" for name, length in lengths.items())
            raise DataError(f"the columns of a dataset must be equally long: {told}")
        self.columns = dict(columns) if isinstance(columns, Mapping) else columns
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Any:
        if isinstance(self.columns, dict):
            return {name: column[row] for name, column in self.columns.items()}
        return tuple(column[row] for column in self.columns)


def as_dataset(dataset: Any) -> Any:
    """Returns a dict or a tuple of arrays as :class:`Columns`; anything else as it is.

    A list stays a list of samples, also where these are arrays.
    """
    if isinstance(dataset, Mapping | tuple):
        columns = dataset.values() if isinstance(dataset, Mapping) else dataset
        plain = type(dataset) in (dict, tuple)  # a named tuple would lose its type
        if plain and dataset and all(_has_rows(column) for column in columns):
            return Columns(dataset)
    return dataset


def fetch_whole(dataset: Any, rows: Sequence[int] | Indices) -> Any:
    """Returns the batch of ``rows``, or None for a dataset that is not made of arrays.

    It is what torch's ``default_collate`` makes of the samples, dtypes included.
    """
    if type(dataset) is Subset:
        return fetch_whole(dataset.dataset, [dataset.indices[row] for row in rows])
    if type(dataset) is TensorDataset:
        return _index_all(list(dataset.tensors), rows)
    if type(dataset) is Columns:
        if isinstance(dataset.columns, dict):
            batches = _index_all(list(dataset.columns.values()), rows)
            return None if batches is None else dict(zip(dataset.columns, batches, strict=True))
        return _index_all(list(dataset.columns), rows)
    return _index(dataset, torch.as_tensor(rows)) if _has_rows(dataset) else None


def _has_rows(value: Any) -> bool:
    """Says whether it is an array or a tensor itself, no subclass that may index otherwise."""
    return type(value) in (np.ndarray, np.memmap, torch.Tensor) and value.ndim > 0


def _index_all(columns: list[Any], rows: Sequence[int] | Indices) -> list[Any] | None:
    chosen = torch.as_tensor(rows)
    batches = [_index(column, chosen) for column in columns]
    return None if any(batch is None for batch in batches) else batches


def _index(column: Any, chosen: torch.Tensor) -> torch.Tensor | None:
    if isinstance(column, torch.Tensor):
        if column.device.type == "cpu":
            # Quicker; but it does not count from the end, nor know all dtypes and shapes.
            with suppress(IndexError, RuntimeError):
                return column.index_select(0, chosen)
        return column[chosen.to(column.device)]
    # Text and objects are collated one by one; so is what torch reads as another dtype, or not.
    if column.dtype.kind not in "biufc" or not column.dtype.isnative or column.dtype == np.uint64:
        return None
    return torch.as_tensor(np.asarray(column[chosen.numpy()]))
