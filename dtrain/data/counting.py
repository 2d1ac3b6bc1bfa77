"""How many samples a batch has: counted where it shows, else asked for; never guessed."""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dtrain.errors import DataError

Count = Callable[[Any], int]  # of a batch's samples

_ASK = (
    "pass Data(..., count=...), a function from a batch to its number of samples, such as "
    "`count=lambda batch: len(batch[0])`"
)


def parts_of(value: Any) -> Mapping[str, Any] | None:
    """Returns what a mapping, list, tuple or dataclass is made of, by name; None for all else."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        return {str(place): part for place, part in enumerate(value)}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in fields(value)}
    return None


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yields the tensors of a batch: those in lists, tuples, mappings and dataclasses, too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_of(part)
    elif (parts := parts_of(value)) is not None:
        for part in parts.values():
            yield from tensors_of(part)


def count_ready(batch: Any, count: Count | None) -> int:
    """Returns the samples of a stream's batch: what all its tensors have in their first dimension.

    Raises DataError where they have not all the same, or there is none.
    """
    if count is not None and (batch is not None or _counts_none(count)):
        return _told(count, batch)
    lengths = {tensor.shape[0] for tensor in tensors_of(batch) if tensor.dim()}
    if len(lengths) == 1:
        return lengths.pop()
    kind = type(batch).__name__
    if not lengths:
        raise DataError(
            f"a stream yielded {kind} without a tensor in it, so its number of samples is unknown: "
            f"yield tensors, or lists, dicts or dataclasses of tensors; or {_ASK}"
        )
    raise DataError(
        f"a stream yielded {kind} whose tensors differ in their first dimension "
        f"({_shapes_of(batch)}), so its number of samples is unknown: {_ASK}"
    )


def count_made(batch: Any, given: int, count: Count | None) -> int:
    """Returns the samples of what a collate_fn made of ``given`` ones: as many, if that shows.

    Raises DataError otherwise: some may have been left out, or what was counted was none.
    """
    if batch is None:
        if not given or (count is not None and _counts_none(count)):
            return 0
        raise DataError(
            f"collate_fn returned None for {given} samples: does it lack a `return`? Where it "
            "may leave all of them out, pass Data(..., count=...), a function that makes 0 of None"
        )
    if count is not None:
        return _told(count, batch)
    found = _readings(batch, lists=False)
    if found is None or len(found) > 1:
        found = _readings(batch, lists=True)
    if found == {given}:
        return given
    raise DataError(
        f"collate_fn was given {given} samples and made {type(batch).__name__} of them "
        f"({_shapes_of(batch) or 'no tensor'}), in which they cannot be counted: some may have "
        f"been left out, or they do not lie in the first dimension. {_ASK[0].upper()}{_ASK[1:]}"
    )


def _counts_none(count: Count) -> bool:
    """Says whether the user's function knows that a batch may be None: nothing left."""
    try:
        return count(None) == 0
    except (TypeError, AttributeError):
        return False


def _readings(value: Any, *, lists: bool) -> set[int] | None:
    """Returns how many samples a part of a batch may have; None where it says nothing of that.

    A list or tuple in a batch may be one of samples, or a part that has parts. One without a tensor
    (names, sizes) counts only where ``lists`` says so: where tensors leave it open.
    """
    if isinstance(value, Tensor | np.ndarray):
        return {value.shape[0]} if value.ndim else None
    if (parts := parts_of(value)) is None:
        return None
    common: set[int] | None = None
    for part in parts.values():
        found = _readings(part, lists=lists)
        if isinstance(part, list | tuple) and (found is not None or lists):
            found = {len(part)} | (found or set())
        if found is not None:
            common = found if common is None else common & found
    if common is None and lists and isinstance(value, list | tuple):
        return {len(value)}
    return common


def _told(count: Count, batch: Any) -> int:
    told = count(batch)
    try:
        samples = -1 if isinstance(told, bool) else operator.index(told)
    except TypeError:
        samples = -1
    if samples < 0:
        raise DataError(f"count(batch) returned {told!r}: it must be a whole number of 0 or more")
    return samples


def _shapes_of(batch: Any) -> str:
    """Returns the shapes of a batch's tensors, by name."""
    shown = [f"{name or 'itself'} {list(one.shape)}" for name, one in _named(batch, "") if one.ndim]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _named(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor | np.ndarray):
        yield name, value
    for key, part in (parts_of(value) or {}).items():
        yield from _named(part, f"{name}.{key}" if name else str(key))
