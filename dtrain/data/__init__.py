"""What to train on, in which order, and who gets which part."""

from dtrain.data.alike import figure_of
from dtrain.data.counting import parts_of, tensors_of
from dtrain.data.feed import EndOfStream, Feed, MicroBatch, MicroBatches
from dtrain.data.map_feed import fetch
from dtrain.data.opening import open_evals, open_feed
from dtrain.data.order import Bucketed, Order, Sequential, Shuffled, Weighted
from dtrain.data.shares import AccumulationSlot, Cut, SizedSlot, sizes_of, split_share
from dtrain.data.source import Data

__all__ = [
    "AccumulationSlot",
    "Bucketed",
    "Cut",
    "Data",
    "EndOfStream",
    "Feed",
    "MicroBatch",
    "MicroBatches",
    "Order",
    "Sequential",
    "Shuffled",
    "SizedSlot",
    "Weighted",
    "fetch",
    "figure_of",
    "open_evals",
    "open_feed",
    "parts_of",
    "sizes_of",
    "split_share",
    "tensors_of",
]
