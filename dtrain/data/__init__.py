"""What to train on, in which order, and who gets which part."""

from dtrain.data.feed import NO_DATA, EndOfStream, Feed, MapFeed, StepFeed, StreamFeed
from dtrain.data.order import Order, Sequential, Shuffled
from dtrain.data.source import Data, as_data

__all__ = [
    "NO_DATA",
    "Data",
    "EndOfStream",
    "Feed",
    "MapFeed",
    "Order",
    "Sequential",
    "Shuffled",
    "StepFeed",
    "StreamFeed",
    "as_data",
]
