"""Ranks that are threads take turns: one runs until it waits for the others, then the next.

So a test runs in the same order each time, and what a process has only one of can be each
rank's own: a rank that gives up its turn takes its random streams along. Where every rank
waits and nobody can come, that is known at once; it takes no timeout to find a deadlock.
"""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dtrain.distributed import random_state_of_host, restore_random_state
from dtrain.errors import is_users


class Unreachable(RuntimeError):
    """Another rank cannot come to a meeting, or not in time."""


@dataclass(slots=True)
class _Rank:
    wake: threading.Condition
    streams: dict[str, Any]
    thread: int = 0  # its identity
    meeting: str = ""  # what it waits for,
    place: str = ""  # from which line,
    error: str = ""  # and why it went on without that
    away: bool = False  # in a block of aside()
    gone: str = ""  # it has left, and how


#: Whom this thread takes turns with, and its rank.
_seat: ContextVar["tuple[Turns, int] | None"] = ContextVar("_seat", default=None)


class Turns:
    """Lets ``size`` threads run one at a time, and meet; all begin with the caller's streams."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self._size, self._timeout_s = size, timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._lock = threading.RLock()  # guards everything below
        self._ranks = [
            _Rank(threading.Condition(self._lock), random_state_of_host()) for _ in range(size)
        ]
        self._turn: int | None = 0
        self._ready = deque(range(1, size))  # may go on, in this order
        self._meetings: dict[str, dict[int, Any]] = {}
        self._over = ""  # why nobody takes turns any more

    @contextmanager
    def seated(self, rank: int) -> Iterator[None]:
        """Makes this thread ``rank``: waits for its first turn, and gives up the last."""
        token = _seat.set((self, rank))
        how = "it has returned"
        try:
            with self._lock:
                self._ranks[rank].thread = threading.get_ident()
                self._take(rank)
            yield
        except BaseException as error:
            how = f"it raised {type(error).__name__}: {error}"
            raise
        finally:
            _seat.reset(token)
            with self._lock:
                self._ranks[rank].gone = how
                if not self._over:
                    self._dismiss([*self._meetings], self._who_left())
                    self._pass_on()

    def meet(self, rank: int, what: str, value: Any) -> list[Any]:
        """Returns what every rank brought to the meeting ``what``, by rank, once all have come.

        Raises Unreachable if a rank has left, all ranks wait for one another, or time is up.
        Ranks: all, communicates.
        """
        mine = self._ranks[rank]
        with self._lock:
            if why := self._over or self._who_left():
                raise Unreachable(why)
            brought = self._meetings.setdefault(what, {})
            brought[rank] = value
            if len(brought) < self._size:
                mine.meeting, mine.place = what, _user_place(sys._getframe(1))
                self._give_up(rank)
                self._take(rank)
                if mine.error:
                    raise Unreachable(mine.error)
            else:  # the last to come keeps its turn
                self._dismiss([what])
        return [brought[other] for other in range(self._size)]

    @contextmanager
    def aside(self, rank: int) -> Iterator[None]:
        """Lets the other ranks take their turns while this one is in the block."""
        with self._lock:
            self._ranks[rank].away = True
            self._give_up(rank)
        try:
            yield
        finally:
            with self._lock:
                self._ranks[rank].away = False
                self._ready.append(rank)
                if self._turn is None:
                    self._pass_on()
                self._take(rank)

    def end(self, why: str) -> None:
        with self._lock:
            self._over = self._over or why
            for rank in self._ranks:
                rank.wake.notify()

    def seconds_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def where_is(self, rank: int) -> str:
        """Returns ``file:line`` where a rank's thread is now, as ``" at ..."``, or nothing."""
        frame = sys._current_frames().get(self._ranks[rank].thread)
        return "" if frame is None else f" at {_user_place(frame)}"

    # -- with the lock held -----------------------------------------------------------------

    def _give_up(self, rank: int) -> None:
        if not self._over:
            self._ranks[rank].streams = random_state_of_host()
            self._pass_on()

    def _take(self, rank: int) -> None:
        mine = self._ranks[rank]
        left_s = self.seconds_left()
        if not mine.wake.wait_for(lambda: self._over or self._turn == rank, left_s):
            absent = [r for r, one in enumerate(self._ranks) if not (one.gone or one.meeting)]
            places = ", ".join(f"rank {r}{self.where_is(r)}" for r in absent)
            self.end(f"{self._timeout_s:.3g} s are over, and the others wait for {places}")
        if self._over:
            raise Unreachable(self._over)
        restore_random_state(mine.streams)

    def _pass_on(self) -> None:
        waiting = [(r, rank) for r, rank in enumerate(self._ranks) if rank.meeting]
        if waiting and not self._ready and not any(rank.away for rank in self._ranks):
            table = "".join(f"\n  rank {r}: {one.meeting}, at {one.place}" for r, one in waiting)
            self._dismiss([*self._meetings], f"all ranks wait, in different places:{table}")
        self._turn = self._ready.popleft() if self._ready else None
        if self._turn is not None:
            self._ranks[self._turn].wake.notify()

    def _dismiss(self, meetings: list[str], error: str = "") -> None:
        """Ends meetings; who waits there goes on, with the error if there is one."""
        for number, rank in enumerate(self._ranks):
            if rank.meeting in meetings:
                rank.meeting, rank.error = "", error
                self._ready.append(number)
        for what in meetings:
            del self._meetings[what]

    def _who_left(self) -> str:
        gone = [(r, rank.gone) for r, rank in enumerate(self._ranks) if rank.gone]
        return "; ".join(f"rank {r} has left: {how}" for r, how in gone)


def aside() -> AbstractContextManager[None]:
    """Lets the other ranks go on while this one waits for something that is not dtrain's.

    In :func:`~dtrain.testing.run_ranks` one rank runs at a time, so a rank that waits for a lock,
    or an event that another rank sets, must let the others run. Nothing may be computed in the
    block. Elsewhere it does nothing.

    Example::

        with dtrain.testing.aside():
            other_rank_is_there.wait(timeout=5)

    Ranks: all, local.
    """
    turns, rank = _seat.get() or (None, 0)
    return nullcontext() if turns is None else turns.aside(rank)


def _user_place(frame: FrameType) -> str:
    """Returns ``file:line`` of the innermost frame of the user's, or of all where there is none."""
    calls = [(call.f_code.co_filename, line) for call, line in traceback.walk_stack(frame)]
    file, line = next((call for call in calls if is_users(call[0])), calls[0])
    return f"{Path(file).name}:{line}"
