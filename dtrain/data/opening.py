"""From :class:`~dtrain.data.Data` to the feed that fits it."""

from typing import Any

from dtrain.data.feed import Feed
from dtrain.data.map_feed import MapFeed
from dtrain.data.shares import Cut, Split
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
    cut: Cut | None = None,
) -> Feed:
    """Returns this rank's steps of a dataset (``split``, ``seed``, ``cut``) or a stream."""
    if data.is_stream:
        return StreamFeed(data, world, batches_per_step, copy_state)
    return MapFeed(data, world, split, seed, cut)


def open_evals(
    given: Any,
    batch_size: int | None,
    world: World,
    split: Split,
    train: Data | None = None,
    *,
    unit: int = 0,
) -> dict[str, Feed]:
    """Returns a feed for each evaluation set, by what its metrics begin with.

    A ``unit`` is how many samples a micro-batch has, at every world size.
    """
    cut = Cut(unit) if unit else None
    return {
        f"eval/{name}" if name else "eval": open_feed(data, world, split, cut=cut)
        for name, data in eval_sets(given, batch_size, train).items()
    }
