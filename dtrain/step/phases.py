"""Phases of a run: where this rank is, and what becomes of an exception."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dtrain.callback import Hooks
from dtrain.distributed import BETWEEN, Comm, Phase
from dtrain.watchdog import StragglerClock

EPOCH_START = Phase("the start of an epoch", slow=True)
EPOCH_END = Phase("the end of an epoch", slow=True)
SETTLING = Phase("settling requests", slow=True)
FIT_END = Phase("the end of fit", slow=True)


@dataclass
class Phases:
    """Tells the watchdog and the stragglers' clock where this rank is, and others why it failed.

    Ranks: all, local; communicates where a block of :meth:`together` raises.
    """

    comm: Comm
    hooks: Hooks  # of which one may have raised
    clock: StragglerClock

    @contextmanager
    def in_step(self, number: int) -> Iterator[None]:
        """A step: others may be anywhere, so a failure is left where they look for it."""
        comm = self.comm
        comm.mark_step(number)
        self.clock.begin_step()
        comm.activity.begin_step(number)
        with comm.alone(lambda: self.hooks.failed_in or "a training step"):
            yield
        self.clock.end_step()
        comm.activity.end_lap(BETWEEN)

    @contextmanager
    def together(self, phase: Phase) -> Iterator[None]:
        """Ranks meet in the verbs of Comm only, so a failure reaches all of them in the next."""
        self.comm.activity.enter(phase)
        with self.comm.lockstep(lambda: self.hooks.failed_in or phase.name):
            yield
        self.comm.activity.enter(BETWEEN)
