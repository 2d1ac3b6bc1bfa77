"""From :class:`~dtrain.data.Data` to the feed that fits it."""

from __future__ import annotations

from dtrain.data.feed import Feed
from dtrain.data.map_feed import MapFeed
from dtrain.data.slices import Split
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
    """Returns all steps of this rank.

    Args:
        data: a dataset or a stream.
        world: which rank, and on which device.
        split: from a rank's share of a global batch to the sizes of its micro-batches.
        seed: which orders of a dataset.
        batches_per_step: how many ready batches of a stream make a step.
        copy_state: copies a stream's state for a checkpoint; None where none is made.

    Ranks: all, local.
    """
    if data.is_stream:
        return StreamFeed(data, world, batches_per_step, copy_state=copy_state)
    return MapFeed(data, world, split, seed)
