"""What to train on: :class:`Data`, and datasets that are arrays."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from dtrain.data.counting import Count
from dtrain.data.order import (
    Bucketed,
    Listed,
    Order,
    Sequential,
    Shuffled,
    Weighted,
    as_order,
    check_rows,
)
from dtrain.errors import ConfigError, DataError

WhenUneven = Literal["idle", "stop"]


@dataclass(eq=False, repr=False)
class Data:
    """What to train on: a map-style dataset, or an iterable of ready batches.

    A map-style dataset (``__len__`` and ``__getitem__``) comes with a ``batch_size``; order,
    sharding and resume are then exact. So does an array, or a dict or tuple of equally long arrays,
    tensors or lists, of each of which a sample has one row. An iterable yields ready batches, each
    rank its own stream; one with ``state_dict`` and ``load_state_dict`` is resumed where it was. At
    the start of each epoch of training, a ``set_epoch(epoch)`` of either is called.

    Example::

        trainer.fit(dtrain.Data(train_set, 64, num_workers=2), epochs=10)

    Args:
        dataset: the dataset or iterable.
        batch_size: the *global* batch: samples that one optimizer step sees, over all ranks.
        shuffle: a new order in every epoch, the same at every world size.
        drop_last: leave out an epoch's last global batch if it is smaller than the others.
        collate_fn: makes a batch of a list of samples; torch's default if None.
        count: from a batch to its number of samples, which is the default weight of its loss. Where
            it shows (all tensors have it in their first dimension, and ``collate_fn`` was given as
            many) it is counted, and otherwise an error asks for this.
        num_workers: loader processes of each rank; 0 loads in the training process, when a step
            needs its batch, so that samples may be made by the model as it is then.
        prefetch: micro-batches that each worker holds ready, 1 or more: workers hold copies of the
            dataset and fetch ahead.
        persistent_workers: workers stay for the next epoch, and so do their copies of the dataset:
            they see no change of it but ``set_epoch``.
        worker_init_fn: called in each worker with its number, when it starts;
            ``torch.utils.data.get_worker_info().dataset`` is its copy of the dataset.
        multiprocessing_context: how workers are started, such as ``"spawn"``; torch's default if
            None.
        order: your own order of samples, instead of ``shuffle``; such as
            :class:`~dtrain.data.Weighted` or :class:`~dtrain.data.Bucketed`; or a list of rows, the
            same in every epoch.
        seed_samples: a sample's random numbers (Python's, NumPy's and torch's) depend on nothing
            but the seed, the epoch and its position in it. So augmentation is the same at any world
            size, micro-batch size and number of workers, at some ten microseconds a sample.
        timeout_s: how long to wait for a batch of the workers before that is an error, in seconds.
        when_uneven: what happens once a rank's iterable has ended and others have not. ``"idle"``:
            it takes part without data until all have. ``"stop"``: the epoch ends for all after the
            last step in which every rank had a batch (each rank then fetches one batch ahead).

    Raises:
        ConfigError: an argument is out of range, or contradicts another.
        DataError: the dataset is empty, or of a kind that cannot be trained on.
    """

    dataset: Any
    batch_size: int | None = None
    _: KW_ONLY
    shuffle: bool = True
    drop_last: bool = False
    collate_fn: Callable[[list[Any]], Any] | None = None
    count: Count | None = None
    num_workers: int = 0
    prefetch: int = 2
    persistent_workers: bool = False
    worker_init_fn: Callable[[int], Any] | None = None
    multiprocessing_context: Any = None
    order: Order | ArrayLike | None = None
    seed_samples: bool = False
    timeout_s: float = 300.0
    when_uneven: WhenUneven = "idle"

    def __post_init__(self) -> None:
        _refuse_loader(self.dataset, self.batch_size)
        _refuse_several(self.dataset)
        if self.when_uneven not in get_args(WhenUneven):
            raise ConfigError(f"when_uneven={self.when_uneven!r}: one of {get_args(WhenUneven)}")
        if self.count is not None and not callable(self.count):
            raise ConfigError(f"count={self.count!r}: a function from a batch to its samples")
        if self.batch_size is None:
            self._check_stream()
        else:
            if isinstance(self.batch_size, Integral) and not isinstance(self.batch_size, bool):
                self.batch_size = int(self.batch_size)  # NumPy's are no JSON
            self.dataset = _as_dataset(self.dataset)
            self._check_map_style(self.batch_size)

    @classmethod
    def of(cls, given: Any, batch_size: int | None, *, shuffle: bool) -> "Data":
        """Returns what was given to ``fit``: as it is if it is Data, else made of all arguments."""
        if not isinstance(given, Data):
            return cls(given, batch_size, shuffle=shuffle)
        if given.shuffle and not (shuffle or given.is_stream):
            # True is what stands there if nobody chose.
            return cls.of(replace(given, shuffle=False), batch_size, shuffle=False)
        if batch_size is None or batch_size == given.batch_size:
            return given
        raise ConfigError(
            f"batch_size={batch_size} is given, but an iterable comes as ready batches: leave "
            "it out"
            if given.is_stream
            else f"batch_size is given twice: {batch_size} here and {given.batch_size} in Data"
        )

    @property
    def is_stream(self) -> bool:
        """True for an iterable of ready batches."""
        return self.batch_size is None

    def positions(self, seed: int) -> Order:
        """Returns the order of samples, of an epoch as long as it is just now.

        Raises ConfigError where an order is of another number of samples than the dataset has,
        DataError where nothing is left.
        """
        samples, kind = len(self.dataset), type(self.dataset).__name__
        if samples == 0:
            raise DataError(f"the dataset ({kind}) is empty")
        if self.order is None:
            order: Order = Shuffled(samples, seed) if self.shuffle else Sequential(samples)
        else:
            order = as_order(self.order)
        name, length = type(order).__name__, len(order)
        if length == 0:
            raise DataError(f"the order ({name}) is empty")
        known = order.samples if isinstance(order, Weighted | Bucketed) else samples
        if type(order) in (Sequential, Shuffled) and length > samples:
            known = length
        if known != samples:
            raise ConfigError(
                f"order={name}(...) is of {known} samples; the dataset ({kind}) has {samples}"
            )
        if isinstance(order, Listed):
            check_rows(order.rows, length, samples, order)
        if self.drop_last and self.batch_size is not None and length < self.batch_size:
            raise DataError(
                f"drop_last leaves nothing: the dataset has {length} samples, a batch "
                f"{self.batch_size}"
            )
        return order

    @property
    def length(self) -> int | None:
        """How many samples, or batches of a stream, there are; None where it has no length."""
        try:
            return len(self.dataset)
        except TypeError:  # a DataLoader has __len__ and may have no length
            return None

    @property
    def is_listed(self) -> bool:
        """True where its rows are listed, in an order that is meant."""
        return self.order is not None and isinstance(as_order(self.order), Listed)

    @property
    def order_name(self) -> str:
        """Names the order in which samples come."""
        if self.is_stream or self.order is None:
            return "stream" if self.is_stream else "shuffled" if self.shuffle else "as they are"
        return type(self.order).__name__

    def _check_stream(self) -> None:
        dataset, name = self.dataset, type(self.dataset).__name__
        if isinstance(dataset, type):
            _refuse_other(dataset)
        map_style = isinstance(dataset, Dataset) and not isinstance(dataset, IterableDataset)
        if map_style or (hasattr(dataset, "__getitem__") and not isinstance(dataset, Iterable)):
            raise ConfigError(
                f"{name} has samples, not ready batches: pass batch_size (the global batch, over "
                "all ranks)"
            )
        columns = type(dataset) is tuple and _are_columns(dataset)
        if columns or has_rows(dataset) or isinstance(dataset, Mapping):
            raise ConfigError(
                f"{name} is taken for a dataset here, of which each sample has one row: pass "
                "batch_size (the global batch, over all ranks). Batches that are ready come in a "
                "list, or another iterable"
            )
        _refuse_other(dataset)
        of_samples = (
            "order drop_last collate_fn num_workers persistent_workers worker_init_fn "
            "multiprocessing_context seed_samples"
        )
        given = [one for one in of_samples.split() if getattr(self, one) is not getattr(Data, one)]
        if given:
            raise ConfigError(
                f"{', '.join(given)}: only for a map-style dataset (with a batch_size); an "
                "iterable comes as ready batches"
            )

    def _check_map_style(self, batch_size: int) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size={batch_size!r}: must be a whole number of 1 or more")
        if self.when_uneven != "idle":
            raise ConfigError(
                f"when_uneven={self.when_uneven!r} is for iterables; ranks share a dataset evenly"
            )
        if self.num_workers < 0 or self.prefetch < 0:
            raise ConfigError(
                f"num_workers={self.num_workers} and prefetch={self.prefetch} must be 0 or more"
            )
        if self.num_workers and not self.prefetch:
            raise ConfigError(
                f"prefetch=0 with num_workers={self.num_workers}: workers fetch ahead, with copies "
                "of the dataset, and of a model in it, as they were when the workers started. "
                "For samples that the live model makes use num_workers=0; else prefetch=1 or more"
            )
        if not self.num_workers and (self.persistent_workers or self.multiprocessing_context):
            raise ConfigError(
                "persistent_workers and multiprocessing_context are for loader workers: pass "
                "num_workers=1 or more, too"
            )
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s={self.timeout_s}: must be more than 0 seconds")
        dataset, name = self.dataset, type(self.dataset).__name__
        indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not indexed or isinstance(dataset, IterableDataset | str | bytes | type):
            _refuse_other(dataset)
            raise ConfigError(
                f"batch_size={batch_size} needs a dataset with __len__ and __getitem__; {name} is "
                "an iterable, which comes as ready batches: leave batch_size out. (If it yields "
                "single samples, torch's DataLoader makes batches of them, on each rank its own: "
                f"Data(DataLoader({name.lower()}, batch_size=...)), without a batch_size here)"
            )
        order = self.positions(0)
        if isinstance(order, Bucketed) and order.batch_size != batch_size:
            raise ConfigError(
                f"order=Bucketed(batch_size={order.batch_size}) makes batches of that size; it is "
                f"{batch_size} here (both mean the global batch)"
            )


class Columns:
    """A map-style dataset of equally long columns: a sample is a dict or a tuple of their rows."""

    def __init__(self, given: Mapping[str, Any] | tuple[Any, ...]) -> None:
        self.names = tuple(given) if isinstance(given, Mapping) else None
        columns = given.values() if isinstance(given, Mapping) else given
        self.columns = tuple(map(_as_column, columns))
        lengths = [len(column) for column in self.columns]
        if len(set(lengths)) > 1:
            named = zip(self.names or range(len(lengths)), lengths, strict=True)
            told = ", ".join(f"{name!r} {length}" for name, length in named)
            raise DataError(f"the columns of a dataset must be equally long: {told}")

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, row: int) -> Any:
        cells = tuple(column[row] for column in self.columns)
        return cells if self.names is None else dict(zip(self.names, cells, strict=True))


def has_rows(value: Any) -> bool:
    """Says whether it is an array or a tensor itself, no subclass that may index otherwise."""
    return type(value) in (np.ndarray, np.memmap, torch.Tensor) and value.ndim > 0


def _are_columns(given: Any) -> bool:
    """Says whether a dict or tuple is made of arrays, tensors and lists only."""
    columns = given.values() if isinstance(given, Mapping) else given
    return bool(given) and all(has_rows(column) or type(column) is list for column in columns)


def _as_column(given: Any) -> Any:
    """Returns a list of numbers, or of equally long lists of them, as a tensor; else as it is."""
    if type(given) is not list or not given or not isinstance(given[0], int | float | list):
        return given
    try:
        return torch.tensor(given)
    except (TypeError, ValueError, RuntimeError):
        return given  # lists of text, or of several lengths


def _as_dataset(given: Any) -> Any:
    """Returns a dict or a tuple of arrays or lists as :class:`Columns`; anything else as it is.

    A list stays a list of samples, also where these are arrays; a named tuple would lose its type.
    """
    if type(given) in (dict, tuple) and _are_columns(given):
        return Columns(given)
    if isinstance(given, dict) and given and all(isinstance(name, str) for name in given):
        kinds = ", ".join(f"{name!r} is {type(part).__name__}" for name, part in given.items())
        raise DataError(
            f"a dict of columns is made of arrays, tensors or lists, with a row a sample: {kinds}"
        )
    return given


def eval_sets(given: Any, batch_size: int | None, train: Data | None) -> dict[str, Data]:
    """Returns what to evaluate on, by name; the name is empty where it is one set.

    A dict is one of sets; or one set, of columns, where those of ``train`` have the same names.
    """
    if given is None:
        return {}
    if isinstance(given, list | tuple) and any(
        isinstance(one, Dataset | DataLoader | Data) for one in given
    ):
        raise ConfigError(
            f"{len(given)} sets to evaluate on have no names: pass a dict such as "
            "{'easy': one, 'hard': another}; their metrics are then eval/easy/loss and so on"
        )
    sets = given if isinstance(given, Mapping) else {"": given}
    if sets is given and _are_columns(given):
        learnt = None if train is None else train.dataset
        if isinstance(learnt, Columns) and {*given} == {*(learnt.names or ())}:
            sets = {"": given}
        elif any(map(has_rows, given.values())) and not has_rows(learnt):
            raise ConfigError(
                f"the dict to evaluate on may be one set, of the columns {', '.join(given)}, or "
                "several sets of these names: pass dtrain.Data({...}, batch_size) for columns, "
                "{'name': dtrain.Data(..., batch_size)} for sets"
            )
    found: dict[str, Data] = {}
    for name, one in sets.items():
        # An iterable of ready batches has no use for a batch size; a dataset needs one.
        ready = isinstance(one, Data) or not hasattr(one, "__getitem__")
        found[name] = Data.of(one, None if ready else batch_size, shuffle=False)
    return found


def _refuse_other(given: Any) -> None:
    """Raises DataError for what is neither samples nor batches."""
    kind = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
    if isinstance(given, str | bytes | type) or not isinstance(given, Iterable):
        raise DataError(
            f"cannot train on {kind}: neither a dataset (__len__ and __getitem__) nor an iterable "
            "of batches"
        )


def _refuse_several(given: Any) -> None:
    """A list of datasets would be taken for one, of which each sample is a dataset."""
    if type(given) not in (list, tuple) or not given:
        return
    if all(isinstance(one, Dataset | DataLoader | Data) for one in given):
        kinds = ", ".join(type(one).__name__ for one in given)
        raise ConfigError(
            f"a {type(given).__name__} of datasets ({kinds}) is no dataset. To train on all of "
            "them, pass torch.utils.data.ConcatDataset([...]); to evaluate on each, a dict of "
            "them: {'name': ...}"
        )


def _refuse_loader(dataset: Any, batch_size: int | None) -> None:
    """A loader over a map-style dataset would give every rank all of the data."""
    if not isinstance(dataset, DataLoader):
        return
    if isinstance(dataset.dataset, IterableDataset):
        if batch_size is not None:
            raise ConfigError("a DataLoader over an iterable has its batch size: leave it out here")
        return
    arguments = [f"batch_size={dataset.batch_size or '...'} * world.size"]
    sampler = type(dataset.sampler).__name__
    if sampler == "SequentialSampler":
        arguments.append("shuffle=False")
    if dataset.drop_last:
        arguments.append("drop_last=True")
    elif sampler not in ("RandomSampler", "SequentialSampler") and dataset.batch_size is not None:
        arguments.append("order=...")
    if dataset.collate_fn is not default_collate:
        name = getattr(dataset.collate_fn, "__name__", "...")
        arguments.append(f"collate_fn={name if name.isidentifier() else '...'}")
    if dataset.num_workers:
        arguments.append(f"num_workers={dataset.num_workers}")
    raise ConfigError(
        "a DataLoader over a map-style dataset would give every rank all of the data. Pass the "
        "dataset itself, with the global batch size:\n"
        f"    dtrain.Data({type(dataset.dataset).__name__.lower()}, {', '.join(arguments)})\n"
        "(or batch_size without `* world.size`, if that is the batch one step is to see)"
    )
