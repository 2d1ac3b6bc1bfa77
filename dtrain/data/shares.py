"""Who gets which part of a global batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dtrain.data.order import Indices, Order, Pointwise, check_rows
from dtrain.errors import ConfigError

Split = Callable[[int], list[int]]  # from a rank's share to the sizes of its micro-batches

# How many positions of an order are looked up together: few at first, so that an epoch begins at
# once; then more and more, as each look-up costs about the same. But of so many steps at most.
_AT_FIRST, _AT_MOST, _STEPS_AT_MOST = 1024, 16384, 1024


@runtime_checkable
class AccumulationSlot(Protocol):
    """Fills the accumulation slot: how a rank's share becomes micro-batches."""

    def split(self, share: int) -> list[int]:
        """Returns the micro-batches' sizes; they sum to ``share``."""

    def batches_per_step(self) -> int:
        """Returns how many ready-made batches of a stream make a step."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How what is only looked at is cut, where no optimizer step is to see a global batch."""

    unit: int = 0  # samples of a micro-batch; 0: a rank's part of a batch
    apart: bool = False  # each rank has samples that follow one another, and not its part of each


@runtime_checkable
class SizedSlot(Protocol):
    """Fills it with micro-batches of one size, where that is not 0; the last may be smaller."""

    micro_batch_size: int


def sizes_of(slot: AccumulationSlot, share: int) -> list[int]:
    """Returns a share's micro-batches' sizes; raises ConfigError where they are not all of it."""
    sizes = list(slot.split(share))
    if sum(sizes) != share or not all(isinstance(n, Integral) and n > 0 for n in sizes):
        raise ConfigError(
            f"{type(slot).__name__}.split({share}) returned {sizes}: sizes of micro-batches are "
            f"whole numbers from 1 on, and sum to the share, {share}"
        )
    return sizes


def split_evenly(total: int, parts: int) -> list[int]:
    """Returns ``parts`` sizes that sum to ``total``, differing by at most 1, larger first."""
    small, larger = divmod(total, parts)
    return [small + (i < larger) for i in range(parts)]


def split_share(share: int, *, steps: int) -> list[int]:
    """Returns up to ``steps`` micro-batch sizes that sum to ``share``; none is empty."""
    return [size for size in split_evenly(share, steps) if size]


def share_of(start: int, stop: int, *, rank: int, size: int) -> tuple[int, int]:
    """Returns this rank's slice of positions, perhaps empty; lower ranks may have one more."""
    # As split_evenly, without its list: this runs in every step, also on 16,384 ranks.
    small, larger = divmod(stop - start, size)
    first = start + rank * small + min(rank, larger)
    return first, first + small + (rank < larger)


@dataclass(frozen=True, slots=True)
class Shares:
    """A rank's part of each step: step ``b`` is positions ``b * B`` to ``(b + 1) * B - 1``."""

    order: Order
    samples: int  # how many positions of an epoch are used
    batch_size: int  # the global batch, B
    rank: int
    size: int  # how many ranks there are
    split: Split
    dataset_length: int  # rows are below it

    @property
    def steps(self) -> int:
        """How many steps an epoch has."""
        return -(-self.samples // self.batch_size)

    def share(self, step: int) -> tuple[int, int]:
        """Returns the first and the end of this rank's positions."""
        start = step * self.batch_size
        stop = min(start + self.batch_size, self.samples)
        return share_of(start, stop, rank=self.rank, size=self.size)

    def sizes(self, step: int) -> tuple[list[int], int]:
        """Returns this rank's micro-batches' sizes, and how many the largest share has."""
        first, end = self.share(step)
        whole = min(self.batch_size, self.samples - step * self.batch_size)
        mine, most = self._split(end - first), self.split(-(-whole // self.size))
        if len(mine) > len(most):
            raise ConfigError(
                f"accumulation splits {end - first} samples into {len(mine)} micro-batches, but "
                f"another rank's {sum(most)} into {len(most)}: more samples need no fewer"
            )
        return mine, len(most)

    def rows_of(self, epoch: int, step: int) -> list[int]:
        """Returns this rank's samples of one step."""
        return [int(row) for row in self.order.indices(epoch, *self.share(step))]

    def rows(
        self, epoch: int, first_step: int, brought: Callable[[Indices], Any] | None = None
    ) -> Iterator[tuple[int, int, int, Any]]:
        """Yields step, number, first position and samples of each micro-batch.

        ``brought`` makes something else, as long, of the samples of several steps at once.
        """
        for step, first, rows in self._rows_of_steps(epoch, first_step, brought):
            done = 0
            for micro, size in enumerate(self._split(len(rows))):
                yield step, micro, first + done, rows[done : done + size]
                done += size

    def _split(self, share: int) -> list[int]:
        return self.split(share) if share else []

    def _rows_of_steps(
        self, epoch: int, first_step: int, brought: Callable[[Indices], Any] | None
    ) -> Iterator[tuple[int, int, Any]]:
        order = self.order
        if not isinstance(order, Pointwise) or type(order).indices is not Pointwise.indices:
            # A user's own: asked only for what comes next.
            for step in range(first_step, self.steps):
                first, end = self.share(step)
                given = order.indices(epoch, first, end)
                rows = check_rows(given, end - first, self.dataset_length, order)
                yield step, first, rows if brought is None else brought(rows)
            return
        begin, at_once = first_step, _AT_FIRST
        while begin < self.steps:
            count = max(1, at_once * self.size // self.batch_size)
            steps = range(begin, min(begin + min(count, _STEPS_AT_MOST), self.steps))
            shares = [self.share(step) for step in steps]
            positions = np.concatenate([np.arange(*share, dtype=np.int64) for share in shares])
            given, done = order.at(epoch, positions), 0
            rows = check_rows(given, len(positions), self.dataset_length, order)
            rows = rows if brought is None else brought(rows)
            for step, (first, end) in zip(steps, shares, strict=True):
                yield step, first, rows[done : done + end - first]
                done += end - first
            begin, at_once = steps.stop, min(2 * at_once, _AT_MOST)


@dataclass(frozen=True, slots=True)
class Blocks(Shares):
    """What ranks have where there is no step to take together: blocks of ``unit`` positions each.

    A block is a micro-batch, so they are cut alike at every world size if the unit is. Ranks take
    turns; or, ``apart``, each has blocks that follow one another, and rank 1's those of rank 0.
    """

    unit: int
    apart: bool

    @property
    def steps(self) -> int:
        return -(-self._blocks // self.size)

    @property
    def _blocks(self) -> int:
        return -(-self.samples // self.unit)

    def share(self, step: int) -> tuple[int, int]:
        block, end = step * self.size + self.rank, self._blocks
        if self.apart:
            first, end = share_of(0, self._blocks, rank=self.rank, size=self.size)
            block = first + step
        start = min(block, end) * self.unit
        stop = start + self.unit if block < end else start
        return min(start, self.samples), min(stop, self.samples)

    def sizes(self, step: int) -> tuple[list[int], int]:
        first, end = self.share(step)
        return [end - first] * (end > first), 1

    def _split(self, share: int) -> list[int]:
        return [share] * (share > 0)


def share_out(
    cut: Cut | None,
    order: Order,
    samples: int,
    batch_size: int,
    rank: int,
    size: int,
    split: Split,
    of: int,
) -> Shares:
    """Returns a rank's part of each batch; or, of what is only looked at, as ``cut`` says."""
    if cut is None:
        return Shares(order, samples, batch_size, rank, size, split, of)
    unit = min(batch_size, cut.unit or -(-min(batch_size, samples) // size))
    return Blocks(order, samples, unit * size, rank, size, split, of, unit, cut.apart)
