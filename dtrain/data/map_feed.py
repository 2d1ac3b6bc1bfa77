"""Feeds map-style datasets: each rank fetches its slice of a batch, or has workers fetch ahead."""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    Sampler,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from dtrain.data.alike import POSITIONS, ROWS_READ, check_alike, rows_within
from dtrain.data.counting import Count, count_made
from dtrain.data.feed import Feed, MicroBatch, MicroBatches, tell_epoch
from dtrain.data.order import Indices, check_rows
from dtrain.data.shares import Cut, Shares, Split, share_out
from dtrain.data.shipping import Shipper, is_numeric
from dtrain.data.source import Columns, Data, has_rows
from dtrain.distributed import World, derive_seed, random_state_kept, seed_everything
from dtrain.errors import DataError

_WORKER_STREAM, _SAMPLE_STREAM = 3, 5
_IS_CPU = attrgetter("is_cpu")

Collate = Callable[[list[Any]], Any] | None


@dataclass(frozen=True, slots=True)
class _Task:
    """A micro-batch to fetch."""

    rows: list[int]
    seed: int  # of what is drawn for it
    seeds: list[int] | None  # perhaps one for each sample
    epoch: int | None  # of which the dataset is to be told


class MapFeed(Feed):
    """Feeds a map-style dataset. Ranks: all, local.

    A checkpoint holds nothing of it: the order is a function of seed, epoch and position.
    """

    samples: int  # never None

    def __init__(
        self, data: Data, world: World, split: Split, seed: int, cut: Cut | None = None
    ) -> None:
        self._data, self._world, self._split, self._seed = data, world, split, seed
        self._cut = cut
        self._shipper = Shipper(world.device)
        # Not of this rank: which one has a sample must not matter.
        of_samples = derive_seed(seed, _SAMPLE_STREAM) if data.seed_samples else None
        self._fetcher = _Fetcher(data.dataset, data.collate_fn, data.count)
        self._measure()
        seed_of_rank = derive_seed(seed, _WORKER_STREAM, world.rank)
        self._tasks = _Tasks(self._shares, seed_of_rank, of_samples)
        self._loader: DataLoader[Any] | None = None
        self._compared = False  # what is evaluated on; the training's is, with each epoch

    def __str__(self) -> str:
        return f"{self.samples} samples in batches of {self._shares.batch_size}"

    def _measure(self) -> None:
        """Takes dataset and order as they are now: a callback or ``set_epoch`` may change them."""
        data, world = self._data, self._world
        assert data.batch_size is not None
        order, size = data.positions(self._seed), data.batch_size
        self.samples = len(order) - len(order) % size if data.drop_last else len(order)
        of = len(data.dataset)
        mine = world.rank, world.size, self._split, of
        self._shares = share_out(self._cut, order, self.samples, size, *mine)
        self.steps_per_epoch = self._shares.steps
        # Asked here, so that a split that cannot be is found before a step is taken.
        self._sizes, self._last_sizes = map(self._shares.sizes, (0, self._shares.steps - 1))
        fetcher = self._fetcher
        fetcher.dataset, fetcher.collate, fetcher.count = data.dataset, data.collate_fn, data.count

    def begin(self, epoch: int) -> None:
        """Tells the dataset of ``epoch``, and looks how long it is. Ranks: all, communicates."""
        tell_epoch(self._data.dataset, epoch)
        self._tasks.told = self._fetcher.told = epoch
        self._measure()
        self._check_alike(f"epoch {epoch}", epoch)

    def compare(self, label: str) -> None:
        """Looks whether an evaluation is of the same on all ranks. Ranks: all, communicates."""
        if not self._compared:
            self._compared = True
            self._measure()
            self._check_alike(f"the evaluation ({label})", 0)

    def _check_alike(self, where: str, epoch: int) -> None:
        shares, size = self._shares, self._shares.batch_size
        asked = min(self.samples, size, POSITIONS) if self._world.size > 1 else 0
        given = shares.order.indices(epoch, 0, asked)
        rows = check_rows(given, asked, shares.dataset_length, shares.order)
        dataset, chosen = rows_within(self._data.dataset, rows.tolist())
        read = fetch_whole(dataset, chosen[:ROWS_READ]) if chosen else None
        check_alike(self._world.comm, where, (self.samples, size), chosen, read)

    def epoch(self, epoch: int, first_step: int) -> Iterator[MicroBatches]:
        self._measure()  # evaluations have no `begin`
        batches = self._batches(epoch, first_step)
        for step in range(first_step, self._shares.steps):
            last = step == self._shares.steps - 1
            sizes, micros = self._last_sizes if last else self._sizes
            yield _MapStep(micros, batches, iter(sizes), self._shares, (epoch, step))

    def rows(self, epoch: int, step: int) -> list[int]:
        """Returns the dataset's rows that this rank has in a step."""
        return self._shares.rows_of(epoch, step)

    def _batches(self, epoch: int, first_step: int) -> Iterator[MicroBatch]:
        data = self._data
        if data.num_workers == 0 and not data.seed_samples:
            fetch, shipper = self._fetcher.fetch, self._shipper
            micros = self._shares.rows(epoch, first_step, self._bring_rows())
            return (fetch(rows, shipper) for _, _, _, rows in micros)
        self._tasks.shares, self._tasks.begin = self._shares, (epoch, first_step)
        if data.num_workers == 0:
            return self._shipped(map(self._fetcher.fetch_here, self._tasks))
        if self._loader is None:
            self._loader = DataLoader(
                self._fetcher,
                sampler=self._tasks,
                batch_size=None,  # a task is a whole micro-batch
                collate_fn=_as_it_is,
                num_workers=data.num_workers,
                prefetch_factor=data.prefetch,
                persistent_workers=data.persistent_workers,
                pin_memory=self._world.device.type == "cuda",
                # Of its own: starting workers must not draw from this rank's stream.
                generator=torch.Generator(),
                worker_init_fn=partial(_start_worker, data.worker_init_fn),
                multiprocessing_context=data.multiprocessing_context,
                timeout=data.timeout_s,
            )
        # For generators that a worker makes of its own: another one on each rank.
        self._loader.generator.manual_seed(derive_seed(self._tasks.seed, epoch))
        return self._shipped(iter(self._loader))

    def _shipped(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        return ((self._shipper.ship(batch), samples) for batch, samples in batches)

    def _bring_rows(self) -> Callable[[Indices], Tensor] | None:
        """Returns what brings rows' numbers to the device, of many steps, if the data lie there."""
        data, found = self._data, _columns_of(self._data.dataset)
        plain = data.collate_fn is None and data.count is None
        if found is None or not (plain and all(map(self._shipper.holds, found[0]))):
            return None
        return partial(_brought, data.dataset, self._shipper)


@dataclass(slots=True)
class _MapStep(MicroBatches):
    micros: int
    batches: Iterator[MicroBatch]
    sizes: Iterator[int]  # samples that are fetched
    shares: Shares
    place: tuple[int, int]  # epoch and step
    before: int = 0  # samples of this step that were fetched before
    size: int = 0  # and last

    def next(self) -> MicroBatch | None:
        size = next(self.sizes, None)
        if size is None:
            return None
        self.before, self.size = self.before + self.size, size
        return next(self.batches)

    def rows(self) -> list[int]:
        return self.shares.rows_of(*self.place)[self.before : self.before + self.size]


@dataclass(eq=False)
class _Tasks(Sampler[_Task]):
    """All micro-batches of an epoch, from a step on: a loader's sampler."""

    shares: Shares
    seed: int  # what is drawn for a micro-batch depends on it, and on its place
    sample_seed: int | None  # the same for each sample, if each is to have a seed of its own
    begin: tuple[int, int] = (0, 0)  # epoch and step
    told: int | None = None  # the epoch of training, of which workers' copies are told as well

    def __iter__(self) -> Iterator[_Task]:
        epoch, first_step = self.begin
        for step, micro, first, rows in self.shares.rows(epoch, first_step):
            seeds = None
            if self.sample_seed is not None:
                positions = range(first, first + len(rows))
                seeds = [derive_seed(self.sample_seed, epoch, at) for at in positions]
            seed = derive_seed(self.seed, epoch, step, micro)
            yield _Task(rows.tolist(), seed, seeds, self.told)


@dataclass(eq=False)
class _Fetcher(Dataset[Any]):
    """What a worker runs. Each micro-batch, or each sample, draws from a stream of its own.

    So random augmentation is the same after a restart, with any number of workers.
    """

    dataset: Any
    collate: Collate
    count: Count | None
    told: int | None = None  # the epoch that this copy of the dataset was told of

    def __getitem__(self, task: _Task) -> MicroBatch:
        if task.epoch != self.told and get_worker_info() is not None:
            assert task.epoch is not None
            tell_epoch(self.dataset, task.epoch)  # a copy, which may have stayed since the last
            self.told = task.epoch
        if task.seeds is None:
            seed_everything(task.seed)
            return self.fetch(task.rows)
        samples: list[Any] = []
        for row, seed in zip(task.rows, task.seeds, strict=True):
            seed_everything(seed)
            samples += _samples(self.dataset, [row])
        return self._made_of(samples, task.rows)

    def fetch_here(self, task: _Task) -> MicroBatch:
        """As a worker would; and the training's own random streams do not notice."""
        with random_state_kept():
            return self[task]

    def fetch(self, rows: Any, shipper: Shipper | None = None) -> MicroBatch:
        """Returns the batch of ``rows``, brought to the device, and its number of samples."""
        plain = self.collate is None and self.count is None
        if plain and (batch := fetch_whole(self.dataset, rows, shipper)) is not None:
            return batch, len(rows)
        rows = rows if isinstance(rows, list) else rows.tolist()
        batch, samples = self._made_of(_samples(self.dataset, rows), rows)
        return batch if shipper is None else shipper.ship(batch), samples

    def _made_of(self, samples: Any, rows: Sequence[int]) -> MicroBatch:
        batch = _collated(samples, rows, self.collate)
        if self.collate is None and self.count is None:
            return batch, len(rows)
        # Samples that could not be read are often None, for collate_fn to leave out.
        given = len(rows) - sum(one is None for one in samples if isinstance(samples, list))
        return batch, count_made(batch, given, self.count)


def _start_worker(of_the_user: Callable[[int], Any] | None, worker: int) -> None:
    """Lets a worker go on where a scheduler signals a whole job: its rank is to finish and save.

    TERM is left as torch has it: a rank that ends sends it to its workers.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # The user's own dataset, which opens its files here; torch knows only what wraps it.
    info: Any = get_worker_info()
    object.__setattr__(info, "dataset", info.dataset.dataset)  # it is frozen
    if of_the_user is not None:
        of_the_user(worker)


def _as_it_is(batch: Any) -> Any:
    return batch


def fetch(dataset: Any, rows: Sequence[int] | Indices, collate: Collate) -> Any:
    """Returns the batch of ``rows``: fetched whole where the dataset can, else collated."""
    if collate is None and (batch := fetch_whole(dataset, rows)) is not None:
        return batch
    rows = rows.tolist() if isinstance(rows, np.ndarray) else rows
    return _collated(_samples(dataset, rows), rows, collate)


def _samples(dataset: Any, rows: Sequence[int]) -> Any:
    if type(dataset) is Subset:  # an error names the row that the user knows
        return _samples(dataset.dataset, [dataset.indices[row] for row in rows])
    row: Any = rows
    try:
        if hasattr(dataset, "__getitems__"):
            samples = dataset.__getitems__(rows)
        else:
            samples = []
            for row in rows:
                samples.append(dataset[row])
    except StopIteration as end:
        raise _no_end(end, row, dataset) from end
    except Exception as error:
        _tell_where(error, row, dataset)
        raise
    if isinstance(samples, list | tuple) and len(samples) != len(rows):
        raise DataError(
            f"{type(dataset).__name__}.__getitems__ gave {len(samples)} samples for {len(rows)} "
            f"rows ({_shown(rows)})"
        )
    return samples


def _collated(samples: Any, rows: Sequence[int], collate: Collate) -> Any:
    collate = collate or default_collate
    try:
        return collate(samples)
    except StopIteration as end:
        raise _no_end(end, rows, collate) from end
    except Exception as error:
        _tell_where(error, rows, collate)
        raise


def _tell_where(error: Exception, rows: Any, source: Any) -> None:
    """Adds to an error which samples it came from: to its words, where these are all it holds."""
    where = f"(in {getattr(source, '__name__', type(source).__name__)}, {_shown(rows)})"
    if type(error).__str__ is BaseException.__str__ and [type(arg) for arg in error.args] == [str]:
        error.args = (f"{error.args[0]} {where}",)
    else:
        error.add_note(where)


def _no_end(end: StopIteration, rows: Any, source: Any) -> DataError:
    """Returns another error for one that would end the epoch without a word."""
    error = DataError("StopIteration, which means an end and is no error of a sample's")
    _tell_where(error, rows, source)
    return error.with_traceback(end.__traceback__)


def _shown(rows: Any) -> str:
    if not isinstance(rows, list | tuple):
        return f"sample {rows}"
    return f"samples {', '.join(map(str, rows[:16]))}" + (" ..." if len(rows) > 16 else "")


def fetch_whole(dataset: Any, rows: Any, shipper: Shipper | None = None) -> Any:
    """Returns what ``default_collate`` would, dtypes too; None for what is not made of arrays.

    A shipper brings it to its device. Rows that are a tensor lie there, and are those of arrays.
    """
    if (found := _columns_of(dataset)) is None:
        return None
    columns, names = found
    if type(dataset) is Subset and not isinstance(rows, Tensor):
        _, rows = rows_within(dataset, rows if isinstance(rows, list) else rows.tolist())
    batches: list[Any] | None = None
    if shipper is not None and shipper.gathers:
        batches = shipper.gather(columns, rows)
    if batches is None:
        is_array = isinstance(rows, np.ndarray)
        chosen = torch.from_numpy(rows) if is_array else torch.as_tensor(rows, device="cpu")
        batches = [_index(column, chosen) for column in columns]
        if any(batch is None for batch in batches):
            return None
        if shipper is not None and not (shipper.keeps and all(map(_IS_CPU, batches))):
            batches = shipper.ship(batches)
    if names is None:
        return batches
    return dict(zip(names, batches, strict=True)) if names else batches[0]


def _columns_of(dataset: Any) -> tuple[Sequence[Any], tuple[str, ...] | None] | None:
    """Returns the arrays that a dataset is made of, and their names.

    No names: a batch is a list. An empty tuple: it is an array itself.
    """
    while type(dataset) is Subset:
        dataset = dataset.dataset
    if type(dataset) is TensorDataset:
        return dataset.tensors, None
    if type(dataset) is Columns:
        return dataset.columns, dataset.names
    return ((dataset,), ()) if has_rows(dataset) else None


def _brought(dataset: Any, shipper: Shipper, rows: Indices) -> Tensor:
    """Returns rows' numbers on the device; those of a Subset as numbers of what it is of."""
    if type(dataset) is Subset:
        arrays, chosen = rows_within(dataset, rows.tolist())
        numbers = torch.as_tensor(chosen, device="cpu").numpy()
        numbers = np.where(numbers < 0, numbers + len(arrays), numbers)
        rows = check_rows(numbers, len(rows), len(arrays), dataset)
    return shipper.send_rows(rows)


def _index(column: Any, chosen: Tensor) -> Tensor | None:
    if isinstance(column, Tensor):
        if column.is_cpu:
            try:
                return column.index_select(0, chosen)
            except (IndexError, RuntimeError):
                pass  # it does not count from the end, nor know all dtypes and shapes
        return column[chosen.to(column.device)]
    if not is_numeric(column):
        return None  # text and objects are collated one by one, as a list is
    return torch.as_tensor(np.asarray(column[chosen.numpy()]))
