"""Exact means over all ranks, torchmetrics objects, and outputs of a whole set."""

from dtrain.metrics.added import with_added
from dtrain.metrics.means import Means, as_metrics, number_of
from dtrain.metrics.outputs import Batch, Outputs, in_order, joined, kept, listed

__all__ = [
    "Batch",
    "Means",
    "Outputs",
    "as_metrics",
    "in_order",
    "joined",
    "kept",
    "listed",
    "number_of",
    "with_added",
]
