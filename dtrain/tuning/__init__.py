"""Found by trying, before a training: a learning rate, and a micro-batch that fits."""

from dtrain.tuning.batch_size import find_batch_size
from dtrain.tuning.lr_range import LRRange, lr_range_test

__all__ = ["LRRange", "find_batch_size", "lr_range_test"]
