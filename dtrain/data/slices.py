"""Which samples a rank has in which step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dtrain.data.order import Indices, Order, Pointwise
from dtrain.data.shares import share_of

Split = Callable[[int], list[int]]  # from a rank's share to the sizes of its micro-batches

#: How many positions of an order are looked up together: few at first, so that an epoch begins at
#: once; then more and more, as each look-up costs about the same. But of so many steps at most.
_AT_FIRST, _AT_MOST = 1024, 16384
_STEPS_AT_MOST = 1024


@dataclass(frozen=True, slots=True)
class Slices:
    """This rank's part of each step: step ``b`` is positions ``b * B`` to ``(b + 1) * B - 1``.

    Attributes:
        order: of the samples.
        samples: positions of an epoch that are used.
        batch_size: the global batch, ``B``.
        rank: this rank.
        size: how many ranks there are.
        split: from this rank's share to the sizes of its micro-batches.

    Ranks: all, local.
    """

    order: Order
    samples: int
    batch_size: int
    rank: int
    size: int
    split: Split

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
        mine = self.split(end - first) if end > first else []
        return mine, len(self.split(-(-whole // self.size)))

    def rows(self, epoch: int, first_step: int) -> Iterator[tuple[int, int, int, Indices]]:
        """Yields step, number, first position and samples of each micro-batch."""
        for step, first, rows in self._shares(epoch, first_step):
            done = 0
            for micro, size in enumerate(self.split(len(rows)) if len(rows) else []):
                yield step, micro, first + done, rows[done : done + size]
                done += size

    def _shares(self, epoch: int, first_step: int) -> Iterator[tuple[int, int, Indices]]:
        """Yields step, first position and samples of this rank's share of each step."""
        order = self.order
        if not isinstance(order, Pointwise) or order.overrides_indices():
            # A user's own: asked only for what comes next.
            for step in range(first_step, self.steps):
                first, end = self.share(step)
                yield step, first, np.asarray(order.indices(epoch, first, end), dtype=np.int64)
            return
        begin, positions_at_once = first_step, _AT_FIRST
        while begin < self.steps:
            count = max(1, positions_at_once * self.size // self.batch_size)
            steps = range(begin, min(begin + min(count, _STEPS_AT_MOST), self.steps))
            shares = [self.share(step) for step in steps]
            positions = np.concatenate([np.arange(*share, dtype=np.int64) for share in shares])
            rows, done = order.at(epoch, positions), 0
            for step, (first, end) in zip(steps, shares, strict=True):
                yield step, first, rows[done : done + end - first]
                done += end - first
            begin = steps.stop
            positions_at_once = min(2 * positions_at_once, _AT_MOST)
