"""What to train on, in which order, and who gets which part."""

from dtrain.data.feed import NO_DATA, EndOfStream, Feed, MicroBatches, StepFeed
from dtrain.data.fetching import fetch
from dtrain.data.map_feed import MapFeed
from dtrain.data.opening import open_feed
from dtrain.data.order import Bucketed, Order, Sequential, Shuffled, Weighted
from dtrain.data.shares import AccumulationSlot, split_share
from dtrain.data.shipping import tensors_of
from dtrain.data.source import Data, as_data
from dtrain.data.streams import StreamFeed

__all__ = [
    "NO_DATA",
    "AccumulationSlot",
    "Bucketed",
    "Data",
    "EndOfStream",
    "Feed",
    "MapFeed",
    "MicroBatches",
    "Order",
    "Sequential",
    "Shuffled",
    "StepFeed",
    "StreamFeed",
    "Weighted",
    "as_data",
    "fetch",
    "open_feed",
    "split_share",
    "tensors_of",
]
