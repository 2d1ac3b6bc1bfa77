"""From :class:`~dtrain.data.source.Data` to micro-batches on one rank's device.

The loop runs by the plan of global steps. A rank whose share of a step is empty gets a step
without micro-batches, and takes part idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from accelerate.utils import find_batch_size, send_to_device
from torch.utils.data import DataLoader, TensorDataset, default_collate

from dtrain.data.order import Order, Sequential, Shuffled
from dtrain.data.shares import share_of
from dtrain.data.source import Data
from dtrain.errors import DataError
from dtrain.world import World, derive_seed

Split = Callable[[int], list[int]]
MicroBatch = tuple[Any, int]

_WORKER_STREAM = 3


class EndOfStream(Exception):
    """This rank's stream of batches has ended."""


class StepFeed(Protocol):
    """The micro-batches of one global step, on one rank."""

    #: How many micro-batches this rank runs in the step; at least 1, which may be idle.
    micros: int

    def next(self) -> MicroBatch | None:
        """Returns a batch on the device and its number of samples, or None for nothing.

        Raises:
            EndOfStream: this rank has no more batches in this epoch.
        """
        ...


class _NoData:
    micros = 1

    def next(self) -> MicroBatch | None:
        return None


#: A step in which this rank has nothing to do.
NO_DATA: StepFeed = _NoData()


class Feed(Protocol):
    """All steps of a run, on one rank."""

    def __str__(self) -> str:
        """Returns what must be equal on all ranks, in words."""
        ...

    @property
    def steps_per_epoch(self) -> int | None:
        """How many steps an epoch has, or None where nobody can know."""
        ...

    def epoch(self, epoch: int, first_step: int) -> Iterator[StepFeed]:
        """Yields the steps of ``epoch`` from ``first_step`` on; a stream's without end."""
        ...


class MapFeed:
    """Feeds a map-style dataset: step ``b`` is positions ``b * B`` to ``(b + 1) * B - 1``.

    Args:
        data: made with a batch size.
        world: which rank's slice.
        split: from a rank's share to the sizes of its micro-batches.
        seed: which orders.

    Ranks: all, local.
    """

    def __init__(self, data: Data, world: World, split: Split, seed: int) -> None:
        assert data.batch_size is not None
        self._data = data
        self._batch_size = data.batch_size
        self._world = world
        self._split = split
        self._seed = seed
        self._order = _order_of(data, seed)
        length = len(self._order)
        self.samples = length - length % self._batch_size if data.drop_last else length
        self.steps_per_epoch = -(-self.samples // self._batch_size)
        self._loader: DataLoader[Any] | None = None
        self._plan = _WorkerPlan(self)

    def __str__(self) -> str:
        return f"{self.samples} samples in batches of {self._batch_size}"

    def shares(self, step: int) -> tuple[int, list[int]]:
        """Returns this rank's first position in a step, and its micro-batches' sizes."""
        start = step * self._batch_size
        stop = min(start + self._batch_size, self.samples)
        first, end = share_of(start, stop, rank=self._world.rank, size=self._world.size)
        return first, self._split(end - first) if end > first else []

    def indices(self, epoch: int, first_step: int) -> Iterator[list[int]]:
        """Yields the samples of each micro-batch of this rank, step after step."""
        for step in range(first_step, self.steps_per_epoch):
            first, sizes = self.shares(step)
            rows = self._order.indices(epoch, first, first + sum(sizes)).tolist()
            for size in sizes:
                yield rows[:size]
                rows = rows[size:]

    def epoch(self, epoch: int, first_step: int) -> Iterator[StepFeed]:
        """Yields the steps of ``epoch`` from ``first_step`` on."""
        batches = self._batches(epoch, first_step)
        for step in range(first_step, self.steps_per_epoch):
            _, sizes = self.shares(step)
            yield _MapStep(batches, sizes, self._world.device)

    def _batches(self, epoch: int, first_step: int) -> Iterator[Any]:
        dataset, collate = self._data.dataset, self._data.collate_fn
        if self._data.num_workers == 0:
            return (fetch(dataset, rows, collate) for rows in self.indices(epoch, first_step))
        if self._loader is None:
            self._loader = self._make_loader()
        self._plan.begin(epoch, first_step)
        generator = self._loader.generator
        assert generator is not None
        generator.manual_seed(
            derive_seed(self._seed, _WORKER_STREAM, epoch, first_step, self._world.rank)
        )
        return iter(self._loader)

    def _make_loader(self) -> DataLoader[Any]:
        return DataLoader(
            self._data.dataset,
            batch_sampler=self._plan,
            num_workers=self._data.num_workers,
            collate_fn=self._data.collate_fn,
            prefetch_factor=max(1, self._data.prefetch),
            persistent_workers=True,
            pin_memory=self._world.device.type == "cuda",
            generator=torch.Generator(),
        )


class _WorkerPlan:
    """The batch sampler that a DataLoader with workers reads from; it is told where to begin."""

    def __init__(self, feed: MapFeed) -> None:
        self._feed = feed
        self._begin = (0, 0)

    def begin(self, epoch: int, first_step: int) -> None:
        self._begin = (epoch, first_step)

    def __iter__(self) -> Iterator[list[int]]:
        return self._feed.indices(*self._begin)


class _MapStep:
    def __init__(self, batches: Iterator[Any], sizes: list[int], device: torch.device) -> None:
        self.micros = max(1, len(sizes))
        self._batches = batches
        self._sizes = iter(sizes)
        self._device = device

    def next(self) -> MicroBatch | None:
        size = next(self._sizes, None)
        if size is None:
            return None
        return send_to_device(next(self._batches), self._device, non_blocking=True), size


class StreamFeed:
    """Feeds an iterable of ready batches, each rank its own stream.

    Args:
        data: made without a batch size.
        world: which device.
        batches_per_step: how many consecutive batches of a rank make a step.

    Ranks: all, local.
    """

    def __init__(self, data: Data, world: World, batches_per_step: int) -> None:
        self._stream: Iterable[Any] = data.dataset
        self._device = world.device
        self._batches_per_step = batches_per_step
        # A length is this rank's alone; the plan must be equal on all of them.
        self.steps_per_epoch: int | None = None

    def __str__(self) -> str:
        return "a stream of each rank's own"

    def epoch(self, epoch: int, first_step: int) -> Iterator[StepFeed]:
        """Yields steps without end; whoever calls stops once every rank's stream has ended."""
        stream = iter(self._stream)
        skip = first_step * self._batches_per_step
        for _ in range(skip):
            next(stream, None)
        while True:
            yield _StreamStep(stream, self._batches_per_step, self._device)


class _StreamStep:
    def __init__(self, stream: Iterator[Any], micros: int, device: torch.device) -> None:
        self.micros = micros
        self._stream = stream
        self._device = device

    def next(self) -> MicroBatch | None:
        try:
            batch = next(self._stream)
        except StopIteration:
            raise EndOfStream from None
        try:
            samples = find_batch_size(batch)
        except TypeError:
            samples = None
        if samples is None:
            raise DataError(
                f"a stream yielded {type(batch).__name__} without a tensor in it, so its number of "
                "samples is unknown; yield tensors, or lists or dicts of tensors"
            )
        return send_to_device(batch, self._device, non_blocking=True), int(samples)


def fetch(dataset: Any, rows: Sequence[int], collate: Callable[[list[Any]], Any] | None) -> Any:
    """Returns the batch of ``rows``: fetched whole where the dataset can, else collated."""
    if collate is None and type(dataset) is TensorDataset:
        # The same list of tensors as collating sample by sample, in one indexing each.
        chosen = torch.as_tensor(rows)
        return [tensor[chosen] for tensor in dataset.tensors]
    if hasattr(dataset, "__getitems__"):
        samples = dataset.__getitems__(rows)
    else:
        samples = [dataset[row] for row in rows]
    return (collate or default_collate)(samples)


def _order_of(data: Data, seed: int) -> Order:
    if data.order is not None:
        return data.order
    length = len(data.dataset)
    return Shuffled(length, seed) if data.shuffle else Sequential(length)
