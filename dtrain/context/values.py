"""What a loss function returns: a mean, over how many units, and what else to report."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Number = float | int | Tensor


@dataclass(frozen=True, slots=True)
class Mean:
    """A metric with a denominator of its own: ``total / weight``, summed over all ranks."""

    total: Number
    weight: Number


@dataclass(slots=True)
class Loss:
    """What a loss function returns: a mean, over how many units, and what else to report.

    Attributes:
        mean: 0-dim tensor with a gradient; a mean over ``weight`` units.
        weight: how many units (samples, tokens) the mean was over; a number or a 0-dim tensor.
            None means the samples of the micro-batch. With weight 0 nothing is contributed,
            even if the mean is NaN. (A weight on the GPU is not read: there a mean that was
            divided by 0 has a gradient of NaN all the same; :meth:`from_sum` has none.)
        metrics: name to value: a number or 0-dim tensor that is a mean over the same units,
            or a :class:`Mean`.
        outputs: anything; reaches ``on_eval_batch``.
    """

    mean: Tensor
    weight: Number | None = None
    metrics: Mapping[str, Number | Mean] = field(default_factory=dict)
    outputs: Any = None

    @classmethod
    def from_sum(
        cls,
        total: Tensor,
        weight: Number,
        metrics: Mapping[str, Number | Mean] | None = None,
        outputs: Any = None,
    ) -> "Loss":
        """A loss given as a sum over ``weight`` units. With weight 0 nothing is divided by 0."""
        if isinstance(weight, Tensor):
            safe: Number = torch.where(weight == 0, torch.ones_like(weight), weight)
        else:
            safe = weight or 1
        return cls(total / safe, weight, metrics or {}, outputs)
