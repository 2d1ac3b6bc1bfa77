"""Exact means over all ranks, and torchmetrics objects."""

from dtrain.metrics.added import with_added
from dtrain.metrics.means import Means, as_metrics

__all__ = [
    "Means",
    "as_metrics",
    "with_added",
]
