"""What a feed is: all steps of a run, on one rank, as micro-batches on its device.

The loop runs by the plan of global steps. A rank whose share of a step is empty gets a step
without micro-batches, and takes part idle.
"""

from collections.abc import Iterator
from typing import Any, Protocol

MicroBatch = tuple[Any, int]  # on the device, and its number of samples


class EndOfStream(Exception):
    """This rank's stream of batches has ended."""


class MicroBatches(Protocol):
    """The micro-batches of one global step, on one rank."""

    #: How many micro-steps the step has, equal on all ranks; some may be idle on this one.
    micros: int

    def next(self) -> MicroBatch | None:
        """Returns a batch on the device and its number of samples, or None for nothing.

        Raises:
            EndOfStream: this rank has no more batches in this epoch.
        """

    def is_last(self) -> bool:
        """Says whether the epoch must end with this step, for want of data on this rank."""
        return False


class Feed(Protocol):
    """All steps of a run, on one rank. Its ``str()`` says what must be equal on all ranks.

    Ranks: all, local.
    """

    #: How many steps an epoch has, or None where nobody can know.
    steps_per_epoch: int | None

    def epoch(self, epoch: int, first_step: int) -> Iterator[MicroBatches]:
        """Yields the steps of ``epoch`` from ``first_step`` on; a stream's without end."""

    def state_dict(self, epoch: int, step: int) -> dict[str, Any] | None:
        """Returns what the plan does not tell of this rank's place, ``step`` steps into ``epoch``.

        Raises:
            CheckpointError: it holds what a checkpoint cannot.
        """
        return None

    def load_state_dict(
        self, state: dict[str, Any] | None, *, ranks: int, epoch: int, step: int
    ) -> str:
        """Takes up what :meth:`state_dict` returned.

        Args:
            state: this rank's; None where it saved none.
            ranks: how many ranks the saved run had.
            epoch: the epoch that comes next.
            step: how many steps of it are done.

        Returns:
            What is not restored, in words; or nothing.

        Raises:
            ResumeError: this many ranks cannot go on from there.
        """
        return ""
