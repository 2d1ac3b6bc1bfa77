"""Phases of a run: where this rank is, and what becomes of an exception."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dtrain.callback import Hooks
from dtrain.distributed import BETWEEN, Comm, Phase
from dtrain.watchdog import StragglerClock

EPOCH_START = Phase("the start of an epoch", slow=True)
EPOCH_END = Phase("the end of an epoch", slow=True)
SETTLING = Phase("settling requests", slow=True)
FIT_END = Phase("the end of fit", slow=True)


class Phases:
    """Tells the watchdog and the stragglers' clock where this rank is, and others why it failed.

    Args:
        comm: to the other ranks.
        hooks: of which one may have raised.
        clock: how long this rank's own work takes.

    Ranks: all, local; communicates where a block of :meth:`together` raises.
    """

    def __init__(self, comm: Comm, hooks: Hooks, clock: StragglerClock) -> None:
        self._comm = comm
        self._hooks = hooks
        self._clock = clock

    @contextmanager
    def in_step(self, number: int) -> Iterator[None]:
        """A step: others may be anywhere, so a failure is left where they look for it."""
        comm = self._comm
        comm.mark_step(number)
        self._clock.begin_step()
        comm.activity.begin_step(number)
        with comm.alone(lambda: self._hooks.failed_in or "a training step"):
            yield
        self._clock.end_step()
        comm.activity.end_lap(BETWEEN)

    @contextmanager
    def together(self, phase: Phase) -> Iterator[None]:
        """Ranks meet in the verbs of Comm only, so a failure reaches all of them in the next."""
        comm = self._comm
        comm.activity.enter(phase)
        with comm.lockstep(lambda: self._hooks.failed_in or phase.name):
            yield
        comm.activity.enter(BETWEEN)
