"""What to train on, in which order, and who gets which part."""

from dtrain.data.feed import NO_DATA, EndOfStream, Feed, MapFeed, StepFeed
from dtrain.data.order import Bucketed, Order, Sequential, Shuffled, Weighted
from dtrain.data.source import Data, as_data
from dtrain.data.streams import StreamFeed

__all__ = [
    "NO_DATA",
    "Bucketed",
    "Data",
    "EndOfStream",
    "Feed",
    "MapFeed",
    "Order",
    "Sequential",
    "Shuffled",
    "StepFeed",
    "StreamFeed",
    "Weighted",
    "as_data",
]
