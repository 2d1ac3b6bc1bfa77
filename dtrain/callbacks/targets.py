"""Targets of a classification: class indices, or soft ones, which have a float for each class."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dtrain.data import tensors_of
from dtrain.errors import DataError

#: A key of a dict or a place in a tuple; several lead into what is nested.
Place = str | int | tuple[str | int, ...]


def hard_labels(y: Tensor) -> Tensor:
    """Returns class indices, ``[B, ...]``; of a mixture, the class with the larger part.

    For metrics in a loss function with ``Mixup`` or ``LabelSmoothing`` in training only, such as
    ``(logits.argmax(1) == hard_labels(y)).float().mean()``.

    Args:
        y: indices, any shape ``[B, ...]``; or a float for each class, ``[B, C, ...]``.
    """
    return y.argmax(1) if y.is_floating_point() else y


def with_soft_targets(
    owner: str, batch: Any, target: Place | None, num_classes: int
) -> tuple[Any, tuple[str | int, ...], Tensor]:
    """Returns a batch with soft targets, where they are in it, and them; see :func:`soft_targets`.

    Where no ``target`` is named, the batch must be a pair ``(x, y)``; else raises DataError.
    """
    if target is None and not (isinstance(batch, list | tuple) and len(batch) == 2):
        raise DataError(
            f"{owner}: a batch must be a pair (x, y), and this is {_form(batch)}; of another, say "
            f"where its targets are, such as {owner}(..., target='labels')"
        )
    place = (1,) if target is None else target if isinstance(target, tuple) else (target,)
    y = batch
    for key in place:
        try:
            y = y[key]
        except (LookupError, TypeError):
            raise DataError(f"{owner}(target={target!r}): no {key!r} in {_form(y)}") from None
    soft = soft_targets(owner, batch, y, num_classes)
    return put(batch, place, soft), place, soft


def soft_targets(owner: str, batch: Any, y: object, num_classes: int) -> Tensor:
    """Returns soft targets ``[B, C]``, of such or of indices ``[B]``; else raises DataError."""
    soft = isinstance(y, Tensor) and y.is_floating_point()
    if not isinstance(y, Tensor) or not y.ndim or y.shape[1:] != ((num_classes,) if soft else ()):
        raise DataError(
            f"{owner}: targets must be class indices [B], or soft targets [B, {num_classes}], "
            f"not {_form(y)}"
        )
    if soft:
        return y
    dtypes = (part.dtype for part in tensors_of(batch) if part.is_floating_point())
    try:
        # No fewer bits than float32: a share of 0.999 must not become 1.
        wide = torch.promote_types(next(dtypes, torch.float32), torch.float32)
        return F.one_hot(y.long(), num_classes).to(wide)
    except RuntimeError as error:
        raise DataError(
            f"{owner}(num_classes={num_classes}): targets must be from 0 to {num_classes - 1}; "
            f"these are from {y.min()} to {y.max()}"
        ) from error


def put(batch: Any, place: tuple[str | int, ...], value: Any) -> Any:
    """Returns a copy of a batch with something else at one place."""
    if not place:
        return value
    inner = put(batch[place[0]], place[1:], value)
    if isinstance(batch, tuple):
        at = range(len(batch))[int(place[0])]
        parts = [inner if i == at else part for i, part in enumerate(batch)]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    new = copy.copy(batch)
    new[place[0]] = inner
    return new


def _form(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with {', '.join(map(repr, value))}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_form, value))})"
    return type(value).__name__
