"""What a feed is: all steps of a run, on one rank, as micro-batches on its device.

The loop runs by the plan of global steps. A rank whose share of a step is empty gets a step
without micro-batches, and takes part idle.
"""

from collections.abc import Iterator
from typing import Any, Protocol

# On the device, and its number of samples. A batch of None has nothing left: all were left out.
MicroBatch = tuple[Any, int]


class EndOfStream(Exception):
    """This rank's stream of batches has ended."""


class MicroBatches(Protocol):
    """The micro-batches of one global step, on one rank."""

    micros: int  # how many micro-steps it has, equal on all ranks; some may be idle on this one

    def next(self) -> MicroBatch | None:
        """Returns a batch, or None for nothing; raises EndOfStream if the epoch has no more."""

    def is_last(self) -> bool:
        """Says whether the epoch must end with this step, for want of data on this rank."""
        return False

    def rows(self) -> list[int] | None:
        """Returns the dataset's rows in the micro-batch that came last; None where it has none."""
        return None


class Feed(Protocol):
    """All steps of a run, on one rank; ``str()`` must be equal on all. Ranks: all, local."""

    steps_per_epoch: int | None  # None where nobody can know
    samples: int | None = None  # of an epoch, over all ranks; likewise

    def begin(self, epoch: int) -> None:
        """Tells the data that an epoch of training begins, and looks how long it is now.

        Raises RankMismatch where ranks have other samples, or another order of them. Ranks: all,
        communicates.
        """

    def compare(self, label: str) -> None:
        """Raises RankMismatch, before an evaluation, where ranks have other samples in it.

        Ranks: all, communicates, once.
        """
        return

    def look_apart(self) -> str:
        """Returns what to tell where streams that are to be each rank's own are the same.

        Ranks: all, communicates, once.
        """
        return ""

    def epoch(self, epoch: int, first_step: int) -> Iterator[MicroBatches]:
        """Yields the steps of ``epoch`` from ``first_step`` on; a stream's without end."""

    def rows(self, epoch: int, step: int) -> list[int] | None:
        """Returns the dataset's rows that this rank has in a step; None where it has no rows."""
        return None

    def state_dict(self, epoch: int, step: int) -> dict[str, Any] | None:
        """Returns what the plan does not tell of this rank's place, ``step`` steps into ``epoch``.

        Raises CheckpointError where it holds what a checkpoint cannot.
        """
        return None

    def load_state_dict(
        self, state: dict[str, Any] | None, *, ranks: int, epoch: int, step: int
    ) -> str:
        """Takes up what this rank saved, as one of ``ranks``; ``step`` of ``epoch`` comes next.

        Returns in words what is not restored; raises ResumeError if this many ranks cannot go on.
        """
        return ""


def tell_epoch(data: Any, epoch: int) -> None:
    """Calls ``set_epoch`` of what shuffles or augments by it: a dataset, or one that it wraps."""
    if callable(tell := getattr(data, "set_epoch", None)):
        tell(epoch)
        return
    several = getattr(data, "datasets", None)  # as in a ConcatDataset
    for inner in [getattr(data, "dataset", None), *(several if type(several) is list else [])]:
        if inner is not None and inner is not data:
            tell_epoch(inner, epoch)
