"""The order of samples: a function of (seed, epoch, position), not a list.

So it takes no memory, is the same at every world size, and begins anywhere in an epoch at once.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Sampler

from dtrain.errors import ConfigError, DataError

Indices = NDArray[np.int64]

_ROUNDS = 8
# What tells the random numbers of one order from those of another with the same seed.
_DRAWS, _BATCHES = 1, 2


class Order(Protocol):
    """Which sample comes at which position of an epoch. Equal on all ranks."""

    def __len__(self) -> int:
        """Returns how many positions an epoch has."""

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        """Returns the samples at positions ``start`` to ``stop - 1`` of ``epoch``."""


class Pointwise(ABC):
    """Tells any positions' samples: in a call of some hundred us, be they few or many."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    @abstractmethod
    def at(self, epoch: int, positions: Indices) -> Indices:
        """Returns the samples at ``positions`` of ``epoch``, in their order."""

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        return self.at(epoch, np.arange(start, stop, dtype=np.int64))


class Sequential(Pointwise):
    """The data set's own order, in every epoch, of ``length`` samples."""

    def at(self, epoch: int, positions: Indices) -> Indices:
        return positions


class Shuffled(Pointwise):
    """A new permutation in every epoch, computed position by position.

    A balanced Feistel network (Luby and Rackoff, 1988) permutes the numbers below the next
    power of four; a value outside of the data set is permuted again until it falls inside
    ("cycle walking": Black and Rogaway, 2002), which keeps it a permutation.

    Args:
        length: how many samples there are.
        seed: which permutations.
    """

    def __init__(self, length: int, seed: int) -> None:
        super().__init__(length)
        self._seed = seed
        half_bits = (max(length - 1, 1).bit_length() + 1) // 2
        self._half = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)

    def at(self, epoch: int, positions: Indices) -> Indices:
        sequence = np.random.SeedSequence([self._seed, epoch])
        keys = sequence.generate_state(_ROUNDS, np.uint64).astype(np.uint64)
        values = self._permute(positions.astype(np.uint64), keys)
        while (outside := values >= self._length).any():
            values[outside] = self._permute(values[outside], keys)
        return values.astype(np.int64)

    def _permute(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


class Weighted(Pointwise):
    """Draws samples with replacement, each as often as its weight says.

    What is drawn at a position depends on nothing else, so that it is resumed like any order.

    Example::

        Data(dataset, 64, order=Weighted(1 / class_counts[labels], seed=0))

    Args:
        weights: one for each sample, 0 or more; shape ``[samples]``. Their sum does not matter.
        seed: which draws.
        length: how many draws make an epoch; as many as there are samples if None.

    Raises:
        ConfigError: a weight is negative or not finite, or none is above 0.
    """

    def __init__(self, weights: ArrayLike, seed: int, length: int | None = None) -> None:
        array = np.asarray(weights, dtype=np.float64)
        if array.ndim != 1 or not np.isfinite(array).all() or (array < 0).any() or not array.any():
            bounds = f", from {array.min()} to {array.max()}" if array.size else ""
            raise ConfigError(
                "Weighted(weights=...): one finite number of 0 or more for each sample, and not "
                f"only zeros; got shape {list(array.shape)}{bounds}"
            )
        if length is not None and length < 1:
            raise ConfigError(f"Weighted(length={length}): must be 1 or more")
        super().__init__(len(array) if length is None else length)
        self.samples = len(array)
        self._bounds = np.cumsum(array)
        self._last = int(np.flatnonzero(array)[-1])
        self._seed = seed

    def at(self, epoch: int, positions: Indices) -> Indices:
        sequence = np.random.SeedSequence([self._seed, epoch, _DRAWS])
        first, second = sequence.generate_state(2, np.uint64).astype(np.uint64)
        bits = _mix(_mix(positions.astype(np.uint64) ^ first) ^ second)
        # 53 bits fill a float64's fraction: 0 <= drawn < 1.
        drawn = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        rows: Indices = np.searchsorted(self._bounds, drawn * self._bounds[-1], side="right")
        return rows.clip(max=self._last)  # the product may have been rounded up


class Bucketed:
    """A new permutation in every epoch, whose global batches hold samples of similar length.

    A window of some batches is shuffled as by :class:`Shuffled`, sorted by length and cut into
    batches; these are shuffled, and so are the samples in each, or the last rank had the longest.

    Example::

        Data(dataset, 64, order=Bucketed([len(text) for text in texts], 64, seed=0))

    Args:
        lengths: one for each sample; shape ``[samples]``.
        batch_size: the global batch, as given to ``Data``.
        seed: which permutations.
        window: how many batches are sorted together; more make one more alike, and less random.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self, lengths: Sequence[float] | ArrayLike, batch_size: int, seed: int, window: int = 50
    ) -> None:
        self._lengths = np.asarray(lengths)
        if self._lengths.ndim != 1:
            got = f"got shape {list(self._lengths.shape)}"
            raise ConfigError(f"Bucketed(lengths=...): one number for each sample; {got}")
        if batch_size < 1 or window < 1:
            raise ConfigError(
                f"Bucketed(batch_size={batch_size}, window={window}): both must be 1 or more"
            )
        self._shuffled = Shuffled(len(self._lengths), seed)
        self.samples = len(self._lengths)
        self.batch_size = batch_size
        self._window = window * batch_size
        self._seed = seed
        self._known = -1, -1, np.empty(0, dtype=np.int64)  # a window of an epoch, and its samples

    def __len__(self) -> int:
        return len(self._lengths)

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        """Returns the samples at positions ``start`` to ``stop - 1`` of ``epoch``."""
        parts = [np.empty(0, dtype=np.int64)]
        for number in range(start // self._window, -(-stop // self._window)):
            if self._known[:2] != (epoch, number):  # steps follow one another: the last one is kept
                self._known = epoch, number, self._sort(epoch, number)
            first = number * self._window
            parts.append(self._known[2][max(start - first, 0) : stop - first])
        return np.concatenate(parts)

    def _sort(self, epoch: int, number: int) -> Indices:
        first = number * self._window
        rows = self._shuffled.indices(epoch, first, min(first + self._window, len(self)))
        random = np.random.default_rng([self._seed, epoch, _BATCHES, number])
        # A ragged batch must stay the epoch's last; its samples are no longer or shorter ones.
        whole = len(rows) - len(rows) % self.batch_size
        batches = rows[:whole][np.argsort(self._lengths[rows[:whole]], kind="stable")]
        batches = random.permutation(batches.reshape(-1, self.batch_size))
        return np.concatenate((random.permuted(batches, axis=1).ravel(), rows[whole:]))


class Listed(Pointwise):
    """The same rows in every epoch, one after another as they are listed."""

    def __init__(self, rows: ArrayLike) -> None:
        try:
            array = np.asarray(rows)
        except ValueError:  # lists of several lengths
            array = np.empty((0, 0))
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ConfigError(
                f"order=[...]: a list of whole numbers, the rows of the dataset; got shape "
                f"{list(array.shape)} of {array.dtype}. Batches are made of it by batch_size"
            )
        super().__init__(len(array))
        self.rows = array.astype(np.int64)

    def at(self, epoch: int, positions: Indices) -> Indices:
        """Returns what is listed at ``positions``."""
        rows: Indices = self.rows[positions]
        return rows


def as_order(given: Any) -> Order:
    """Returns what was given as ``order=``: a list of rows as :class:`Listed`, an order as it is.

    Raises ConfigError for anything else, with what to pass instead.
    """
    if isinstance(given, list | tuple | range | np.ndarray | Tensor):
        return Listed(given)
    name = type(given).__name__
    if isinstance(given, Sampler):
        raise ConfigError(
            f"order={name}: {_instead_of(given)}. (A sampler draws from a generator that ranks do "
            "not share, and cannot begin in the middle, as a resumed run does)"
        )
    if not (callable(getattr(given, "indices", None)) and hasattr(given, "__len__")):
        raise ConfigError(
            f"order={name}: pass a list of rows, or an object with __len__ and indices(epoch, "
            "start, stop), such as dtrain.data.Weighted or Bucketed"
        )
    order: Order = given
    return order


def _instead_of(sampler: Sampler[Any]) -> str:
    """Says what to pass instead of one of torch's samplers."""
    kind, size = type(sampler).__name__, getattr(sampler, "num_samples", None)
    if kind == "WeightedRandomSampler" and getattr(sampler, "replacement", True):
        return f"pass order=dtrain.data.Weighted(sampler.weights, seed=0, length={size})"
    if kind == "SubsetRandomSampler":
        return (
            "pass torch.utils.data.Subset(dataset, sampler.indices) as the dataset, and no order: "
            "it is shuffled anew in each epoch"
        )
    if kind == "RandomSampler" and not getattr(sampler, "replacement", False):
        return "leave it out: samples are shuffled anew in each epoch"
    if kind == "SequentialSampler":
        return "pass shuffle=False instead"
    if kind == "DistributedSampler":
        return "leave it out: each rank gets its share of every batch"
    if kind == "BatchSampler":
        return "leave it out: batches are made by batch_size, of an order of single rows"
    return (
        "pass an object with __len__ and indices(epoch, start, stop), or list(sampler) for the "
        "same rows in every epoch"
    )


def check_rows(given: Any, asked: int, samples: int, order: object) -> Indices:
    """Returns rows that an order gave; raises DataError where they are not those asked for."""
    rows, name = np.asarray(given), type(order).__name__
    if rows.ndim != 1 or len(rows) != asked:
        got = len(rows) if rows.ndim == 1 else f"shape {list(rows.shape)}"
        raise DataError(f"the order ({name}) was asked for {asked} rows and gave {got}")
    if not asked:
        return rows.astype(np.int64)
    if rows.dtype.kind not in "iu":
        raise DataError(
            f"the order ({name}) gave rows that are no whole numbers: {rows.dtype}, such as "
            f"{rows[0]}"
        )
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= samples:
        raise DataError(
            f"the order ({name}) gave row {low if low < 0 else high}; the dataset has {samples} "
            f"samples, 0 to {samples - 1}"
        )
    return rows.astype(np.int64, copy=False)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of MurmurHash3: each bit of the input moves half of the output's bits."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
