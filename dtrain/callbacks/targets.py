"""Targets of a classification: class indices, or soft ones, which have a float for each class."""

import torch
from torch import Tensor
from torch.nn import functional as F

from dtrain.errors import DataError


def hard_labels(y: Tensor) -> Tensor:
    """Returns class indices, ``[B, ...]``; of a mixture, the class with the larger part.

    For metrics in a loss function with ``Mixup`` or ``LabelSmoothing`` in training only, such as
    ``(logits.argmax(1) == hard_labels(y)).float().mean()``.

    Args:
        y: indices, any shape ``[B, ...]``; or a float for each class, ``[B, C, ...]``.
    """
    return y.argmax(1) if y.is_floating_point() else y


def soft_targets(owner: str, x: object, y: object, num_classes: int) -> Tensor:
    """Returns soft targets ``[B, C]``, of such or of indices ``[B]``; else raises DataError."""
    soft = isinstance(y, Tensor) and y.is_floating_point()
    if not isinstance(y, Tensor) or not y.ndim or y.shape[1:] != ((num_classes,) if soft else ()):
        found = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise DataError(
            f"{owner}: targets must be class indices [B], or soft targets [B, {num_classes}], "
            f"not {found}"
        )
    if soft:
        return y
    floats = x.dtype if isinstance(x, Tensor) and x.is_floating_point() else torch.float32
    # No fewer bits than float32: a share of 0.999 must not become 1.
    return F.one_hot(y, num_classes).to(torch.promote_types(floats, torch.float32))
