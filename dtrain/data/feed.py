"""From :class:`~dtrain.data.source.Data` to micro-batches on one rank's device.

The loop runs by the plan of global steps. A rank whose share of a step is empty gets a step
without micro-batches, and takes part idle.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dtrain.data.columns import fetch_whole
from dtrain.data.order import Indices, Order, Pointwise, Sequential, Shuffled
from dtrain.data.shares import share_of
from dtrain.data.shipping import ship
from dtrain.data.source import Data
from dtrain.distributed import World, derive_seed, random_streams, seed_everything

Split = Callable[[int], list[int]]
MicroBatch = tuple[Any, int]

#: How many positions of an order are looked up together: few at first, so that an epoch begins at
#: once; then more and more, as each look-up costs about the same. But of so many steps at most.
_AT_FIRST, _AT_MOST = 1024, 16384
_STEPS_AT_MOST = 1024
_WORKER_STREAM = 3
_SAMPLE_STREAM = 5


class EndOfStream(Exception):
    """This rank's stream of batches has ended."""


class StepFeed(Protocol):
    """The micro-batches of one global step, on one rank."""

    #: How many micro-steps the step has, equal on all ranks; some may be idle on this one.
    micros: int

    def next(self) -> MicroBatch | None:
        """Returns a batch on the device and its number of samples, or None for nothing.

        Raises:
            EndOfStream: this rank has no more batches in this epoch.
        """
        ...

    def is_last(self) -> bool:
        """Says whether the epoch must end with this step, for want of data on this rank."""
        ...


class _NoData:
    micros = 1

    def next(self) -> MicroBatch | None:
        return None

    def is_last(self) -> bool:
        return False


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

    def state_dict(self, epoch: int, step: int) -> dict[str, Any] | None:
        """Returns what a checkpoint must hold of this rank's data, ``step`` steps into ``epoch``.

        That is what the place in the plan does not tell; None where that is nothing.
        """
        ...

    def load_state_dict(
        self, state: dict[str, Any] | None, *, ranks: int, epoch: int, step: int
    ) -> str:
        """Takes up what :meth:`state_dict` returned.

        Args:
            state: this rank's; None where it saved none.
            ranks: how many ranks the saved run had.
            epoch: the epoch that comes next.
            step: how many steps of it are done.

        Returns:
            What is not restored, in words; or nothing.

        Raises:
            ResumeError: this many ranks cannot go on from there.
        """
        ...


class MapFeed:
    """Feeds a map-style dataset: step ``b`` is positions ``b * B`` to ``(b + 1) * B - 1``.

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
        self._seed = seed
        order = _order_of(data, seed)
        samples = len(order) - len(order) % data.batch_size if data.drop_last else len(order)
        self._slices = _Slices(order, samples, data.batch_size, world.rank, world.size, split)
        self.samples = samples
        self.steps_per_epoch = self._slices.steps
        self._tasks = _Tasks(
            self._slices,
            derive_seed(seed, _WORKER_STREAM, world.rank),
            # Not of this rank: which one has a sample must not matter.
            derive_seed(seed, _SAMPLE_STREAM) if data.seed_samples else None,
        )
        self._loader: DataLoader[Any] | None = None

    def __str__(self) -> str:
        return f"{self.samples} samples in batches of {self._slices.batch_size}"

    def shares(self, step: int) -> tuple[int, list[int]]:
        """Returns this rank's first position in a step, and its micro-batches' sizes."""
        return self._slices.shares(step)

    def indices(self, epoch: int, first_step: int) -> Iterator[list[int]]:
        """Yields the samples of each micro-batch of this rank, step after step."""
        for rows in self._rows(epoch, first_step):
            yield rows.tolist()

    def _rows(self, epoch: int, first_step: int) -> Iterator[Indices]:
        return (rows for _, _, _, rows in self._slices.rows(epoch, first_step))

    def epoch(self, epoch: int, first_step: int) -> Iterator[StepFeed]:
        """Yields the steps of ``epoch`` from ``first_step`` on."""
        batches = self._batches(epoch, first_step)
        whole = self._slices.sizes(0)  # of all steps but perhaps the last
        for step in range(first_step, self.steps_per_epoch):
            last = step == self.steps_per_epoch - 1
            sizes, micros = self._slices.sizes(step) if last else whole
            yield _MapStep(batches, sizes, micros, self._device)

    def state_dict(self, epoch: int, step: int) -> dict[str, Any] | None:
        """Returns None: the order of samples is a function of seed, epoch and position."""
        return None

    def load_state_dict(
        self, state: dict[str, Any] | None, *, ranks: int, epoch: int, step: int
    ) -> str:
        """Takes up nothing, at any number of ranks."""
        return ""

    def _batches(self, epoch: int, first_step: int) -> Iterator[Any]:
        dataset, collate = self._data.dataset, self._data.collate_fn
        if self._data.num_workers == 0 and not self._data.seed_samples:
            return (fetch(dataset, rows, collate) for rows in self._rows(epoch, first_step))
        self._tasks.begin(epoch, first_step)
        if self._data.num_workers == 0:
            return (_fetch_here(dataset, task, collate) for task in self._tasks)
        if self._loader is None:
            self._loader = DataLoader(
                _Fetcher(dataset, collate),
                sampler=self._tasks,
                batch_size=None,  # a task is a whole micro-batch
                collate_fn=_as_it_is,
                num_workers=self._data.num_workers,
                prefetch_factor=self._data.prefetch,
                persistent_workers=True,
                pin_memory=self._device.type == "cuda",
                # Of its own: starting workers must not draw from this rank's stream.
                generator=torch.Generator(),
                worker_init_fn=_outlive_signals,
                timeout=self._data.timeout_s,
            )
        return iter(self._loader)


@dataclass(frozen=True, slots=True)
class _Slices:
    """Which samples this rank has in which step."""

    order: Order
    samples: int
    batch_size: int
    rank: int
    size: int
    split: Split

    @property
    def steps(self) -> int:
        return -(-self.samples // self.batch_size)

    def shares(self, step: int) -> tuple[int, list[int]]:
        first, end = self._share(step)
        return first, self.split(end - first) if end > first else []

    def _share(self, step: int) -> tuple[int, int]:
        start = step * self.batch_size
        stop = min(start + self.batch_size, self.samples)
        return share_of(start, stop, rank=self.rank, size=self.size)

    def sizes(self, step: int) -> tuple[list[int], int]:
        """Returns this rank's micro-batches' sizes, and how many the largest share has."""
        whole = min(self.batch_size, self.samples - step * self.batch_size)
        return self.shares(step)[1], len(self.split(-(-whole // self.size)))

    def rows(self, epoch: int, first_step: int) -> Iterator[tuple[int, int, int, Indices]]:
        """Yields step, number, first position and samples of each micro-batch."""
        for step, first, rows in self._shares_of(epoch, first_step):
            done = 0
            for micro, size in enumerate(self.split(len(rows)) if len(rows) else []):
                yield step, micro, first + done, rows[done : done + size]
                done += size

    def _shares_of(self, epoch: int, first_step: int) -> Iterator[tuple[int, int, Indices]]:
        """Yields step, first position and samples of this rank's share of each step."""
        order = self.order
        if not isinstance(order, Pointwise) or order.overrides_indices():
            # A user's own: asked only for what comes next.
            for step in range(first_step, self.steps):
                first, end = self._share(step)
                yield step, first, np.asarray(order.indices(epoch, first, end), dtype=np.int64)
            return
        begin, positions_at_once = first_step, _AT_FIRST
        while begin < self.steps:
            count = max(1, positions_at_once * self.size // self.batch_size)
            count = min(count, _STEPS_AT_MOST)
            steps = range(begin, min(begin + count, self.steps))
            shares = [self._share(step) for step in steps]
            positions = np.concatenate([np.arange(*share, dtype=np.int64) for share in shares])
            rows, done = order.at(epoch, positions), 0
            for step, (first, end) in zip(steps, shares, strict=True):
                yield step, first, rows[done : done + end - first]
                done += end - first
            begin = steps.stop
            positions_at_once = min(2 * positions_at_once, _AT_MOST)


@dataclass(frozen=True, slots=True)
class _Task:
    """A micro-batch to fetch, and the seed of what is drawn for it, or for each sample."""

    rows: list[int]
    seed: int
    sample_seeds: list[int] | None = None


class _Tasks(Sampler[_Task]):
    """The loader's sampler; it is told where to begin."""

    def __init__(self, slices: _Slices, seed: int, sample_seed: int | None) -> None:
        self._slices = slices
        self._seed = seed
        self._sample_seed = sample_seed
        self._begin = (0, 0)

    def begin(self, epoch: int, first_step: int) -> None:
        self._begin = (epoch, first_step)

    def __iter__(self) -> Iterator[_Task]:
        epoch, first_step = self._begin
        for step, micro, first, rows in self._slices.rows(epoch, first_step):
            seeds = None
            if self._sample_seed is not None:
                places = range(first, first + len(rows))
                seeds = [derive_seed(self._sample_seed, epoch, place) for place in places]
            yield _Task(rows.tolist(), derive_seed(self._seed, epoch, step, micro), seeds)


class _Fetcher(Dataset[Any]):
    """What a worker runs. Each micro-batch draws from a stream of its own.

    So random augmentation is the same after a restart, with any number of workers.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any] | None) -> None:
        self._dataset = dataset
        self._collate = collate

    def __getitem__(self, task: _Task) -> Any:
        if task.sample_seeds is not None:
            return _fetch_seeded(self._dataset, task.rows, task.sample_seeds, self._collate)
        seed_everything(task.seed)
        return fetch(self._dataset, task.rows, self._collate)


def _fetch_here(dataset: Any, task: _Task, collate: Callable[[list[Any]], Any] | None) -> Any:
    """As a worker would; and the training's own random streams do not notice."""
    assert task.sample_seeds is not None
    with random_streams.kept():
        return _fetch_seeded(dataset, task.rows, task.sample_seeds, collate)


def _fetch_seeded(
    dataset: Any,
    rows: Sequence[int],
    seeds: Sequence[int],
    collate: Callable[[list[Any]], Any] | None,
) -> Any:
    """Returns the batch of ``rows``, each of which draws from a stream of its own."""
    samples: list[Any] = []
    for row, seed in zip(rows, seeds, strict=True):
        seed_everything(seed)
        samples += dataset.__getitems__([row]) if _fetches_many(dataset) else [dataset[row]]
    return (collate or default_collate)(samples)


def _outlive_signals(worker: int) -> None:
    """Lets a worker go on where a scheduler signals every process of a job.

    Its rank is to finish the step and save. TERM is left as torch has it: a rank that ends sends
    it to its workers.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch


class _MapStep:
    def __init__(
        self, batches: Iterator[Any], sizes: list[int], micros: int, device: torch.device
    ) -> None:
        self.micros = micros
        self._batches = batches
        self._sizes = iter(sizes)
        self._device = device

    def next(self) -> MicroBatch | None:
        size = next(self._sizes, None)
        if size is None:
            return None
        return ship(next(self._batches), self._device), size

    def is_last(self) -> bool:
        return False  # the plan of steps says when an epoch ends


def fetch(
    dataset: Any, rows: Sequence[int] | Indices, collate: Callable[[list[Any]], Any] | None
) -> Any:
    """Returns the batch of ``rows``: fetched whole where the dataset can, else collated."""
    if collate is None and (batch := fetch_whole(dataset, rows)) is not None:
        return batch
    rows = rows.tolist() if isinstance(rows, np.ndarray) else rows
    if _fetches_many(dataset):
        samples = dataset.__getitems__(rows)
    else:
        samples = [dataset[row] for row in rows]
    return (collate or default_collate)(samples)


def _fetches_many(dataset: Any) -> bool:
    return hasattr(dataset, "__getitems__")


def _order_of(data: Data, seed: int) -> Order:
    if data.order is not None:
        return data.order
    length = len(data.dataset)
    return Shuffled(length, seed) if data.shuffle else Sequential(length)
