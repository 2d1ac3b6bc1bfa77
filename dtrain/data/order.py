"""The order of samples: a function of (seed, epoch, position), not a list.

A keyed permutation gives the i-th sample of an epoch in O(1) memory, so that the order is the
same at every world size, and starting in the middle of an epoch costs nothing.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_ROUNDS = 8


class Order(Protocol):
    """Which sample comes at which position of an epoch. Equal on all ranks."""

    def __len__(self) -> int:
        """Returns how many positions an epoch has."""
        ...

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        """Returns the samples at positions ``start`` to ``stop - 1`` of ``epoch``."""
        ...


class Sequential:
    """The data set's own order, in every epoch.

    Args:
        length: how many samples there are.
    """

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        """Returns the positions themselves."""
        return np.arange(start, stop, dtype=np.int64)


class Shuffled:
    """A new permutation in every epoch, computed position by position.

    A balanced Feistel network (Luby and Rackoff, 1988) permutes the numbers below the next
    power of four; a value outside of the data set is permuted again until it falls inside
    ("cycle walking": Black and Rogaway, 2002), which keeps it a permutation.

    Args:
        length: how many samples there are.
        seed: which permutations.
    """

    def __init__(self, length: int, seed: int) -> None:
        self._length = length
        self._seed = seed
        half_bits = max(1, ((max(length - 1, 1)).bit_length() + 1) // 2)
        self._half = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)

    def __len__(self) -> int:
        return self._length

    def indices(self, epoch: int, start: int, stop: int) -> Indices:
        """Returns the samples at positions ``start`` to ``stop - 1`` of ``epoch``."""
        sequence = np.random.SeedSequence([self._seed, epoch])
        keys = sequence.generate_state(_ROUNDS, np.uint64).astype(np.uint64)
        values = self._permute(np.arange(start, stop, dtype=np.uint64), keys)
        outside = values >= self._length
        while outside.any():
            values[outside] = self._permute(values[outside], keys)
            outside = values >= self._length
        return values.astype(np.int64)

    def _permute(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of MurmurHash3: each bit of the input moves half of the output's bits."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
