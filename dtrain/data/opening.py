"""From :class:`~dtrain.data.Data` to the feed that fits it."""

from typing import Any

from dtrain.data.feed import Feed
from dtrain.data.map_feed import MapFeed
from dtrain.data.shares import Split
from dtrain.data.source import Data, eval_sets
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


def open_evals(
    given: Any, batch_size: int | None, world: World, split: Split, train: Data | None = None
) -> dict[str, Feed]:
    """Returns a feed for each evaluation set, by what its metrics begin with."""
    return {
        f"eval/{name}" if name else "eval": open_feed(data, world, split)
        for name, data in eval_sets(given, batch_size, train).items()
    }
