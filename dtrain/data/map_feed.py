"""Feeds map-style datasets: each rank fetches its slice of the global batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from dtrain.data.feed import Feed, MicroBatch, MicroBatches
from dtrain.data.fetching import Fetcher, Tasks, fetch, open_loader
from dtrain.data.order import Sequential, Shuffled
from dtrain.data.shares import Shares, Split
from dtrain.data.shipping import ship
from dtrain.data.source import Data
from dtrain.distributed import World, derive_seed

_WORKER_STREAM, _SAMPLE_STREAM = 3, 5


class MapFeed(Feed):
    """Feeds a map-style dataset.

    A checkpoint holds nothing of it: the order is a function of seed, epoch and position.

    Args:
        data: made with a batch size.
        world: which rank's slice.
        split: from a rank's share to the sizes of its micro-batches.
        seed: which orders, and which random numbers workers draw.

    Ranks: all, local.
    """

    def __init__(self, data: Data, world: World, split: Split, seed: int) -> None:
        assert data.batch_size is not None
        self._data = data
        self._device = world.device
        if (order := data.order) is None:
            length = len(data.dataset)
            order = Shuffled(length, seed) if data.shuffle else Sequential(length)
        self.samples = len(order) - len(order) % data.batch_size if data.drop_last else len(order)
        self._shares = Shares(order, self.samples, data.batch_size, world.rank, world.size, split)
        self.steps_per_epoch = self._shares.steps
        self._tasks = Tasks(
            self._shares,
            derive_seed(seed, _WORKER_STREAM, world.rank),
            # Not of this rank: which one has a sample must not matter.
            derive_seed(seed, _SAMPLE_STREAM) if data.seed_samples else None,
        )
        self._loader: DataLoader[Any] | None = None

    def __str__(self) -> str:
        return f"{self.samples} samples in batches of {self._shares.batch_size}"

    def epoch(self, epoch: int, first_step: int) -> Iterator[MicroBatches]:
        """Yields the steps of ``epoch`` from ``first_step`` on."""
        batches = self._batches(epoch, first_step)
        whole = self._shares.sizes(0)  # of all steps but perhaps the last
        for step in range(first_step, self._shares.steps):
            last = step == self._shares.steps - 1
            sizes, micros = self._shares.sizes(step) if last else whole
            yield _MapStep(micros, batches, iter(sizes), self._device)

    def _batches(self, epoch: int, first_step: int) -> Iterator[Any]:
        data = self._data
        if data.num_workers == 0 and not data.seed_samples:
            micros = self._shares.rows(epoch, first_step)
            return (fetch(data.dataset, rows, data.collate_fn) for _, _, _, rows in micros)
        self._tasks.begin = (epoch, first_step)
        if data.num_workers == 0:
            return map(Fetcher(data).fetch_here, self._tasks)
        if self._loader is None:
            self._loader = open_loader(data, self._tasks, pin=self._device.type == "cuda")
        return iter(self._loader)


@dataclass(slots=True)
class _MapStep(MicroBatches):
    micros: int
    batches: Iterator[Any]
    sizes: Iterator[int]
    device: torch.device

    def next(self) -> MicroBatch | None:
        size = next(self.sizes, None)
        return None if size is None else (ship(next(self.batches), self.device), size)
