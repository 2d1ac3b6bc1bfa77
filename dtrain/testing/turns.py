"""Ranks that are threads take turns: one runs until it waits for the others, then the next.

So a test runs in the same order each time, and what a process has only one of can be each
rank's own: a rank that gives up its turn takes its random streams along. Where every rank
waits and nobody can come, that is known at once; it takes no timeout to find a deadlock.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dtrain.distributed import random_state_of_host, restore_random_state

_DTRAIN = str(Path(__file__).resolve().parents[1])


class Unreachable(RuntimeError):
    """Another rank cannot come to a meeting, or not in time."""


@dataclass(slots=True)
class _Visit:
    what: str
    place: str
    error: str = ""


@dataclass(slots=True)
class _Rank:
    wake: threading.Condition
    streams: dict[str, Any]
    thread: int | None = None
    visit: _Visit | None = None  # it waits in this meeting
    away: bool = False  # in a block of aside()
    gone: str = ""  # it has left, and how


#: Whom this thread takes turns with, and its rank.
_seat: ContextVar["tuple[Turns, int] | None"] = ContextVar("_seat", default=None)


class Turns:
    """Lets ``size`` threads run one at a time, and meet.

    All begin with the caller's random streams.

    Ranks: one object serves all.
    """

    def __init__(self, size: int, timeout_s: float) -> None:
        self._size = size
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._lock = threading.Lock()  # guards everything below
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
                    self._dismiss(self._who_left())
                    self._pass_on()

    def meet(self, rank: int, what: str, value: Any) -> list[Any]:
        """Returns what every rank brought to the meeting ``what``, by rank, once all have come.

        Raises:
            Unreachable: a rank has left, all ranks wait for one another, or time is up.

        Ranks: all, communicates.
        """
        with self._lock:
            if why := self._over or self._who_left():
                raise Unreachable(why)
            brought = self._meetings.setdefault(what, {})
            brought[rank] = value
            if len(brought) < self._size:
                visit = _Visit(what, _user_place(sys._getframe(1)))
                self._ranks[rank].visit = visit
                self._give_up(rank)
                self._take(rank)
                if visit.error:
                    raise Unreachable(visit.error)
            else:  # the last to come keeps its turn
                del self._meetings[what]
                for other in sorted(brought):
                    if other != rank:
                        self._ranks[other].visit = None
                        self._ready.append(other)
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
        """Ends all waiting."""
        with self._lock:
            self._break(why)

    def seconds_left(self) -> float:
        """Returns how long it may still take."""
        return max(0.0, self._deadline - time.monotonic())

    def where_is(self, rank: int) -> str:
        """Returns ``file:line`` where a rank's thread is now, as ``" at ..."``, or nothing."""
        frame = sys._current_frames().get(self._ranks[rank].thread or 0)
        return "" if frame is None else f" at {_user_place(frame)}"

    # -- with the lock held -----------------------------------------------------------------

    def _give_up(self, rank: int) -> None:
        if not self._over:
            self._ranks[rank].streams = random_state_of_host()
            self._pass_on()

    def _take(self, rank: int) -> None:
        """Returns once it is this rank's turn, with its random streams in place."""
        mine = self._ranks[rank]
        while self._turn != rank and not self._over:
            left = self._deadline - time.monotonic()
            if left <= 0:
                self._break(self._late())
            else:
                mine.wake.wait(left)
        if self._over:
            raise Unreachable(self._over)
        restore_random_state(mine.streams)

    def _pass_on(self) -> None:
        """Gives the turn to the next rank, if one may go on."""
        waiting = {r: rank.visit for r, rank in enumerate(self._ranks) if rank.visit is not None}
        if waiting and not self._ready and not any(rank.away for rank in self._ranks):
            table = "".join(f"\n  rank {r}: {v.what}, at {v.place}" for r, v in waiting.items())
            self._dismiss(f"all ranks wait, in different places:{table}")
        self._turn = self._ready.popleft() if self._ready else None
        if self._turn is not None:
            self._ranks[self._turn].wake.notify()

    def _dismiss(self, why: str) -> None:
        """Ends every meeting that is open; who waits there goes on with an error."""
        self._meetings.clear()
        for number, rank in enumerate(self._ranks):
            if rank.visit is not None:
                rank.visit.error = why
                rank.visit = None
                self._ready.append(number)

    def _break(self, why: str) -> None:
        self._over = self._over or why
        for rank in self._ranks:
            rank.wake.notify()

    def _late(self) -> str:
        absent = [r for r, rank in enumerate(self._ranks) if not rank.gone and rank.visit is None]
        places = ", ".join(f"rank {r}{self.where_is(r)}" for r in absent)
        return f"{self._timeout_s:.3g} s are over, and the others wait for {places}"

    def _who_left(self) -> str:
        gone = [(r, rank.gone) for r, rank in enumerate(self._ranks) if rank.gone]
        return "; ".join(f"rank {r} has left: {how}" for r, how in gone)


@contextmanager
def aside() -> Iterator[None]:
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
    with nullcontext() if turns is None else turns.aside(rank):
        yield


def _user_place(frame: FrameType) -> str:
    """Returns ``file:line`` of the innermost frame outside of dtrain, torch and Python itself."""
    walk: FrameType | None = frame
    while walk is not None:
        name = walk.f_code.co_filename
        if not (name.startswith((_DTRAIN, "<")) or "/torch/" in name or "/lib/python3" in name):
            return f"{Path(name).name}:{walk.f_lineno}"
        walk = walk.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
