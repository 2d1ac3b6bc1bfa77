"""Who gets which part of a global batch."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


def split_evenly(total: int, parts: int) -> list[int]:
    """Returns ``parts`` sizes that sum to ``total``, differing by at most 1, larger first."""
    small, larger = divmod(total, parts)
    return [small + (i < larger) for i in range(parts)]


def share_of(start: int, stop: int, *, rank: int, size: int) -> tuple[int, int]:
    """Returns this rank's slice of the positions ``start`` to ``stop - 1``: first and stop.

    Slices are contiguous, in the order of ranks; where it does not divide, lower ranks have
    one sample more. A rank's slice may be empty.
    """
    # As split_evenly, without its list: this runs in every step, also on 16,384 ranks.
    small, larger = divmod(stop - start, size)
    first = start + rank * small + min(rank, larger)
    return first, first + small + (rank < larger)


def split_share(share: int, *, steps: int) -> list[int]:
    """Returns up to ``steps`` micro-batch sizes that sum to ``share``; none is empty."""
    return [size for size in split_evenly(share, steps) if size]


@runtime_checkable
class AccumulationSlot(Protocol):
    """Fills the accumulation slot: how a rank's share becomes micro-batches."""

    def split(self, share: int) -> list[int]:
        """Returns the micro-batches' sizes; they sum to ``share``."""
        ...

    def batches_per_step(self) -> int:
        """Returns how many ready-made batches of a stream make a step."""
        ...
