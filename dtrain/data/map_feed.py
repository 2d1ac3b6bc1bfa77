"""Feeds map-style datasets: each rank fetches its slice of a batch, or has workers fetch ahead."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset, default_collate

from dtrain.data.feed import Feed, MicroBatch, MicroBatches, ship
from dtrain.data.order import Indices, Sequential, Shuffled
from dtrain.data.shares import Shares, Split
from dtrain.data.source import Columns, Data, has_rows
from dtrain.distributed import World, derive_seed, random_state_kept, seed_everything

_WORKER_STREAM, _SAMPLE_STREAM = 3, 5

Collate = Callable[[list[Any]], Any] | None

# The rows of a micro-batch, the seed of what is drawn for it, and perhaps one for each sample.
_Task = tuple[list[int], int, list[int] | None]


class MapFeed(Feed):
    """Feeds a map-style dataset. Ranks: all, local.

    A checkpoint holds nothing of it: the order is a function of seed, epoch and position.
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
        # Asked here, so that a split that cannot be is found before a step is taken.
        self._sizes, self._last_sizes = map(self._shares.sizes, (0, self._shares.steps - 1))
        self._tasks = _Tasks(
            self._shares,
            derive_seed(seed, _WORKER_STREAM, world.rank),
            # Not of this rank: which one has a sample must not matter.
            derive_seed(seed, _SAMPLE_STREAM) if data.seed_samples else None,
        )
        self._fetcher = _Fetcher(data.dataset, data.collate_fn)
        self._loader: DataLoader[Any] | None = None

    def __str__(self) -> str:
        return f"{self.samples} samples in batches of {self._shares.batch_size}"

    def epoch(self, epoch: int, first_step: int) -> Iterator[MicroBatches]:
        """Yields the steps of ``epoch`` from ``first_step`` on."""
        batches = self._batches(epoch, first_step)
        for step in range(first_step, self._shares.steps):
            last = step == self._shares.steps - 1
            sizes, micros = self._last_sizes if last else self._sizes
            yield _MapStep(micros, batches, iter(sizes), self._device)

    def rows(self, epoch: int, step: int) -> list[int]:
        """Returns the dataset's rows that this rank has in a step."""
        return self._shares.rows_of(epoch, step)

    def _batches(self, epoch: int, first_step: int) -> Iterator[Any]:
        data = self._data
        if data.num_workers == 0 and not data.seed_samples:
            micros = self._shares.rows(epoch, first_step)
            return (fetch(data.dataset, rows, data.collate_fn) for _, _, _, rows in micros)
        self._tasks.begin = (epoch, first_step)
        if data.num_workers == 0:
            return map(self._fetcher.fetch_here, self._tasks)
        if self._loader is None:
            self._loader = DataLoader(
                self._fetcher,
                sampler=self._tasks,
                batch_size=None,  # a task is a whole micro-batch
                collate_fn=_as_it_is,
                num_workers=data.num_workers,
                prefetch_factor=data.prefetch,
                persistent_workers=True,  # they stay for the next epoch
                pin_memory=self._device.type == "cuda",
                # Of its own: starting workers must not draw from this rank's stream.
                generator=torch.Generator(),
                worker_init_fn=_outlive_signals,
                timeout=data.timeout_s,
            )
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


@dataclass(eq=False)
class _Tasks(Sampler[_Task]):
    """All micro-batches of an epoch, from a step on: a loader's sampler."""

    shares: Shares
    seed: int  # what is drawn for a micro-batch depends on it, and on its place
    sample_seed: int | None  # the same for each sample, if each is to have a seed of its own
    begin: tuple[int, int] = (0, 0)  # epoch and step

    def __iter__(self) -> Iterator[_Task]:
        epoch, first_step = self.begin
        for step, micro, first, rows in self.shares.rows(epoch, first_step):
            seeds = None
            if self.sample_seed is not None:
                positions = range(first, first + len(rows))
                seeds = [derive_seed(self.sample_seed, epoch, at) for at in positions]
            yield rows.tolist(), derive_seed(self.seed, epoch, step, micro), seeds


@dataclass(eq=False)
class _Fetcher(Dataset[Any]):
    """What a worker runs. Each micro-batch, or each sample, draws from a stream of its own.

    So random augmentation is the same after a restart, with any number of workers.
    """

    dataset: Any
    collate: Collate

    def __getitem__(self, task: _Task) -> Any:
        rows, seed_of_all, seeds = task
        if seeds is None:
            seed_everything(seed_of_all)
            return fetch(self.dataset, rows, self.collate)
        samples: list[Any] = []
        for row, seed in zip(rows, seeds, strict=True):
            seed_everything(seed)
            samples += _samples(self.dataset, [row])
        return (self.collate or default_collate)(samples)

    def fetch_here(self, task: _Task) -> Any:
        """As a worker would; and the training's own random streams do not notice."""
        with random_state_kept():
            return self[task]


def _outlive_signals(worker: int) -> None:
    """Lets a worker go on where a scheduler signals a whole job: its rank is to finish and save.

    TERM is left as torch has it: a rank that ends sends it to its workers.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch


def fetch(dataset: Any, rows: Sequence[int] | Indices, collate: Collate) -> Any:
    """Returns the batch of ``rows``: fetched whole where the dataset can, else collated."""
    if collate is None and (batch := fetch_whole(dataset, rows)) is not None:
        return batch
    rows = rows.tolist() if isinstance(rows, np.ndarray) else rows
    return (collate or default_collate)(_samples(dataset, rows))


def _samples(dataset: Any, rows: Sequence[int]) -> Any:
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(rows)
    return [dataset[row] for row in rows]


def fetch_whole(dataset: Any, rows: Sequence[int] | Indices) -> Any:
    """Returns what ``default_collate`` would, dtypes too; None for what is not made of arrays."""
    if type(dataset) is Subset:
        return fetch_whole(dataset.dataset, [dataset.indices[row] for row in rows])
    if has_rows(dataset):
        return _index(dataset, torch.as_tensor(rows))
    if type(dataset) is TensorDataset:
        columns, names = dataset.tensors, None
    elif type(dataset) is Columns:
        columns, names = dataset.columns, dataset.names
    else:
        return None
    chosen = torch.as_tensor(rows)
    batches = [_index(column, chosen) for column in columns]
    if any(batch is None for batch in batches):
        return None
    return batches if names is None else dict(zip(names, batches, strict=True))


def _index(column: Any, chosen: torch.Tensor) -> torch.Tensor | None:
    if isinstance(column, torch.Tensor):
        if column.device.type == "cpu":
            # Quicker; but it does not count from the end, nor know all dtypes and shapes.
            with suppress(IndexError, RuntimeError):
                return column.index_select(0, chosen)
        return column[chosen.to(column.device)]
    # Text and objects are collated one by one; so is what torch reads as another dtype, or not.
    if column.dtype.kind not in "biufc" or not column.dtype.isnative or column.dtype == np.uint64:
        return None
    return torch.as_tensor(np.asarray(column[chosen.numpy()]))
