"""What to train on: :class:`Data`, and datasets that are arrays."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from dtrain.data.order import Order
from dtrain.errors import ConfigError, DataError

WhenUneven = Literal["idle", "stop"]


@dataclass(eq=False, repr=False)
class Data:
    """What to train on: a map-style dataset, or an iterable of ready batches.

    A map-style dataset (``__len__`` and ``__getitem__``) comes with a ``batch_size``; order,
    sharding and resume are then exact. So does an array, or a dict or tuple of equally long arrays
    or tensors, of each of which a sample has one row. An iterable yields ready batches, each rank
    its own stream; one with ``state_dict`` and ``load_state_dict`` is resumed where it was.

    Example::

        trainer.fit(dtrain.Data(train_set, 64, num_workers=2), epochs=10)

    Args:
        dataset: the dataset or iterable.
        batch_size: the *global* batch: samples that one optimizer step sees, over all ranks.
        shuffle: a new order in every epoch, the same at every world size.
        drop_last: leave out an epoch's last global batch if it is smaller than the others.
        collate_fn: makes a batch of a list of samples; torch's default if None.
        num_workers: loader processes of each rank; 0 loads in the training process, when a step
            needs its batch, so that samples may be made by the model as it is then.
        prefetch: micro-batches that each worker holds ready, 1 or more: workers hold copies of the
            dataset and fetch ahead.
        order: your own order of samples, instead of ``shuffle``; such as
            :class:`~dtrain.data.Weighted` or :class:`~dtrain.data.Bucketed`.
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
    num_workers: int = 0
    prefetch: int = 2
    order: Order | None = None
    seed_samples: bool = False
    timeout_s: float = 300.0
    when_uneven: WhenUneven = "idle"

    def __post_init__(self) -> None:
        _refuse_loader(self.dataset, self.batch_size)
        if self.when_uneven not in get_args(WhenUneven):
            raise ConfigError(f"when_uneven={self.when_uneven!r}: one of {get_args(WhenUneven)}")
        if self.batch_size is None:
            self._check_stream()
        else:
            self.dataset = _as_dataset(self.dataset)
            self._check_map_style(self.batch_size)

    @classmethod
    def of(cls, given: Any, batch_size: int | None, *, shuffle: bool) -> "Data":
        """Returns what was given to ``fit``: as it is if it is Data, else made of all arguments."""
        if not isinstance(given, Data):
            return cls(given, batch_size, shuffle=shuffle)
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

    @property
    def order_name(self) -> str:
        """Names the order in which samples come."""
        if self.is_stream or self.order is None:
            return "stream" if self.is_stream else "shuffled" if self.shuffle else "as they are"
        return type(self.order).__name__

    def _check_stream(self) -> None:
        dataset, name = self.dataset, type(self.dataset).__name__
        map_style = isinstance(dataset, Dataset) and not isinstance(dataset, IterableDataset)
        if map_style or (hasattr(dataset, "__getitem__") and not isinstance(dataset, Iterable)):
            raise ConfigError(
                f"{name} has samples, not ready batches: pass batch_size (the global batch, over "
                "all ranks)"
            )
        if not isinstance(dataset, Iterable):
            raise DataError(
                f"cannot train on {name}: neither a dataset (__len__ and __getitem__) nor an "
                "iterable of batches"
            )
        needs_samples = self.drop_last or self.collate_fn or self.num_workers or self.seed_samples
        if self.order is not None or needs_samples:
            raise ConfigError(
                "order, drop_last, collate_fn, num_workers and seed_samples need a map-style "
                "dataset; an iterable comes as ready batches"
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
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s={self.timeout_s}: must be more than 0 seconds")
        dataset, order, name = self.dataset, self.order, type(self.dataset).__name__
        indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not indexed or isinstance(dataset, IterableDataset):
            raise ConfigError(
                f"batch_size={batch_size} needs a dataset with __len__ and __getitem__; {name} is "
                "an iterable, which comes as ready batches: leave batch_size out"
            )
        if len(dataset) == 0:
            raise DataError(f"the dataset ({name}) is empty")
        if order is not None and len(order) == 0:
            raise DataError(f"the order ({type(order).__name__}) is empty")
        length = len(dataset if order is None else order)
        if self.drop_last and length < batch_size:
            raise DataError(
                f"drop_last leaves nothing: the dataset has {length} samples, a batch {batch_size}"
            )


class Columns:
    """A map-style dataset of equally long arrays: a sample is a dict or a tuple of their rows."""

    def __init__(self, given: Mapping[str, Any] | tuple[Any, ...]) -> None:
        self.names = tuple(given) if isinstance(given, Mapping) else None
        self.columns = tuple(given.values()) if isinstance(given, Mapping) else given
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


def _as_dataset(given: Any) -> Any:
    """Returns a dict or a tuple of arrays as :class:`Columns`; anything else as it is.

    A list stays a list of samples, also where these are arrays; a named tuple would lose its type.
    """
    if type(given) in (dict, tuple) and given:
        columns = given.values() if isinstance(given, dict) else given
        if all(has_rows(column) for column in columns):
            return Columns(given)
    return given


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
    elif sampler != "RandomSampler" and dataset.batch_size is not None:
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
