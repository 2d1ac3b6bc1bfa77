"""From samples to a batch, in the training process or in a loader's workers.

Ranks: all, local.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dtrain.data.columns import fetch_whole
from dtrain.data.order import Indices
from dtrain.data.shares import Shares
from dtrain.data.source import Data
from dtrain.distributed import derive_seed, random_state_kept, seed_everything

Collate = Callable[[list[Any]], Any] | None


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


@dataclass(frozen=True, slots=True)
class Task:
    """A micro-batch to fetch, and the seed of what is drawn for it, or for each sample."""

    rows: list[int]
    seed: int
    sample_seeds: list[int] | None = None


class Tasks(Sampler[Task]):
    """All micro-batches of an epoch, from a step on: a loader's sampler.

    Args:
        shares: what this rank has to fetch.
        seed: what is drawn for a micro-batch depends on it, and on its place.
        sample_seed: the same for each sample, if each is to have a seed of its own.
    """

    def __init__(self, shares: Shares, seed: int, sample_seed: int | None) -> None:
        self._shares = shares
        self._seed = seed
        self._sample_seed = sample_seed
        #: The epoch and step to begin at.
        self.begin = (0, 0)

    def __iter__(self) -> Iterator[Task]:
        epoch, first_step = self.begin
        for step, micro, first, rows in self._shares.rows(epoch, first_step):
            seeds = None
            if self._sample_seed is not None:
                positions = range(first, first + len(rows))
                seeds = [derive_seed(self._sample_seed, epoch, at) for at in positions]
            yield Task(rows.tolist(), derive_seed(self._seed, epoch, step, micro), seeds)


class Fetcher(Dataset[Any]):
    """What a worker runs. Each micro-batch, or each sample, draws from a stream of its own.

    So random augmentation is the same after a restart, with any number of workers.
    """

    def __init__(self, data: Data) -> None:
        self._dataset = data.dataset
        self._collate = data.collate_fn

    def __getitem__(self, task: Task) -> Any:
        if task.sample_seeds is None:
            seed_everything(task.seed)
            return fetch(self._dataset, task.rows, self._collate)
        samples: list[Any] = []
        for row, seed in zip(task.rows, task.sample_seeds, strict=True):
            seed_everything(seed)
            samples += _samples(self._dataset, [row])
        return (self._collate or default_collate)(samples)

    def fetch_here(self, task: Task) -> Any:
        """As a worker would; and the training's own random streams do not notice."""
        with random_state_kept():
            return self[task]


def open_loader(data: Data, tasks: Tasks, *, pin: bool) -> DataLoader[Any]:
    """Returns a loader whose workers do ``tasks``, and stay for the next epoch."""
    return DataLoader(
        Fetcher(data),
        sampler=tasks,
        batch_size=None,  # a task is a whole micro-batch
        collate_fn=_as_it_is,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch,
        persistent_workers=True,
        pin_memory=pin,
        # Of its own: starting workers must not draw from this rank's stream.
        generator=torch.Generator(),
        worker_init_fn=_outlive_signals,
        timeout=data.timeout_s,
    )


def _outlive_signals(worker: int) -> None:
    """Lets a worker go on where a scheduler signals every process of a job.

    Its rank is to finish the step and save. TERM is left as torch has it: a rank that ends sends
    it to its workers.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch
