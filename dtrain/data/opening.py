"""From :class:`~dtrain.data.Data` to the feed that fits it."""

from dtrain.data.feed import Feed
from dtrain.data.map_feed import MapFeed
from dtrain.data.shares import Split
from dtrain.data.source import Data
from dtrain.data.streams import CopyState, StreamFeed
from dtrain.distributed import World


def open_feed(
    data: Data,
    world: World,
    split: Split,
    *,
    seed: int = 0,
    batches_per_step: int = 1,
    copy_state: CopyState | None = None,
) -> Feed:
    """Returns this rank's steps of a dataset (``split``, ``seed``) or a stream (the rest)."""
    if data.is_stream:
        return StreamFeed(data, world, batches_per_step, copy_state)
    return MapFeed(data, world, split, seed)
