"""No silent hang: a rank that no longer moves is named on every rank, and the run ends.

One daemon thread per rank, while ``fit`` or ``evaluate`` runs. Twice a second it reads where the
main thread is (:mod:`dtrain.activity`), and posts that in the rendezvous store. It alone uses its
connection, and gives each call a deadline of its own. What it makes of it all is decided in
:mod:`dtrain.watchdog.judgement`; what a report looks like is in docs/hangs.md.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import math
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]

from dtrain.distributed import (
    Heartbeat,
    Phase,
    World,
    end_with,
    heartbeat_key,
    look_up,
    stopped_children,
    this_machine,
)
from dtrain.errors import ConfigError, DtrainError, Failure, HangError, RemoteError
from dtrain.watchdog.judgement import (
    ALL_LOOK,
    LOOKERS,
    Seen,
    Verdict,
    behind,
    gives_way,
    judge,
    looks,
    stuck,
)
from dtrain.watchdog.stacks import Stack, main_stack

T = TypeVar("T")

#: What a process ends with that the watchdog ends.
HANG_EXIT_CODE = 70

HANG_AFTER_S = 5.0  # the default: a step may take this long, or ten times the slowest recent one
# The same, outside of a step, in a fit's first, while torch compiles, and for data, unless a worker
# is stopped.
LONG_S = 300.0
TICK_S = 0.5
_STORE_S = 3.0  # a call of the store that takes longer will not come back
_GRACE_S = 3.0  # for the main thread to raise what the watchdog has found
_AT_EXIT_S = 10.0  # for a call that is still under way when the process ends
_LINGER_S = 1.5  # for the other ranks to read it, before this one's end ends them too
_PATIENCE_S = 30.0  # after which a wait in a slow phase is worth a line
_FLUSH_S = 1.0
_FINDING_OUT = Phase("finding out which rank was lost", slow=True)
_SILENT_S = 2.5  # once connections have broken, a rank that posts nothing this long is the cause
# Of that many keys the store takes 0.7 us each, of 10,000 in one call 10 us each.
_KEYS_AT_ONCE = 256


# Posts of all watchdogs of this process, so that a later fit's are told from an earlier one's.
_numbers = itertools.count(1)


class Watchdog:
    """Watches this rank's main thread while it is entered, and the other ranks where it waits.

    Args:
        world: the ranks. In a world of one there is nothing to watch.
        hang_after_s: see :class:`dtrain.Trainer`; None watches nothing.

    Raises:
        ConfigError: ``hang_after_s`` is less than a second.

    Ranks: all, local; it talks to the rendezvous store, and never to a rank.
    """

    def __init__(self, world: World, hang_after_s: float | None = HANG_AFTER_S) -> None:
        if hang_after_s is not None and not hang_after_s >= 1:
            raise ConfigError(
                f"hang_after_s={hang_after_s}: must be at least 1 second, or None for no watchdog"
            )
        self._world = world
        self._activity = world.comm.activity
        self._hang_after_s = hang_after_s
        self._watch: _Watch | None = None
        self._depth = 0

    def __enter__(self) -> Watchdog:
        self._depth += 1
        if self._activity.watched:
            return self  # an evaluation inside of fit
        self._activity.restart()
        if self._hang_after_s is not None and self._world.connect is not None:
            self._watch = _Watch(self._world, self._hang_after_s, self._world.connect)
            self._activity.watched = True
            self._watch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._watch is not None and not self._depth:
            self._activity.watched = False
            self._watch.stop()
            self._watch = None

    def explain(self, error: BaseException) -> DtrainError | None:
        """Returns which rank's end is why this rank lost the others, if that is what happened.

        Waits a few seconds where it takes that to see which rank posts nothing any more.

        Ranks: all, local.
        """
        if self._watch is None or not self._world.comm.may_be_broken(error):
            return None
        failure = self._watch.find_lost()
        return None if failure is None else RemoteError(str(failure))


@dataclass
class _Heard:
    """The last post of another rank, and when it came, by this rank's clock."""

    heartbeat: Heartbeat
    since: float


class _Others:
    """The other ranks, read while something seems wrong."""

    def __init__(self, store: Store, size: int, machine: str) -> None:
        self._store = store
        self._size = size
        self._machine = machine
        self._heard: dict[int, _Heard] = {}

    def look(self, now: float) -> list[Seen]:
        """Reads all ranks' posts.

        Args:
            now: a clock that stands still while this process does.
        """
        for rank, text in enumerate(self._read()):
            heartbeat, known = Heartbeat.from_json(text), self._heard.get(rank)
            if known is None or known.heartbeat.number != heartbeat.number:
                self._heard[rank] = _Heard(heartbeat, now)
        return [
            Seen(heard.heartbeat, now - heard.since, look_up(heard.heartbeat, self._machine))
            for heard in self._heard.values()
        ]

    def _read(self) -> Iterator[bytes]:
        for first in range(0, self._size, _KEYS_AT_ONCE):
            some = range(first, min(first + _KEYS_AT_ONCE, self._size))
            yield from self._store.multi_get([heartbeat_key(rank) for rank in some])


class _Watch(threading.Thread):
    """The thread."""

    def __init__(self, world: World, hang_after_s: float, connect: Callable[[], Store]) -> None:
        super().__init__(name="dtrain watchdog", daemon=True)
        self._world = world
        self._activity = world.comm.activity
        self._hang_after_s = hang_after_s
        self._connect = connect
        self._machine = this_machine()
        self._calls = _Bounded()
        self._ended = threading.Event()
        self._store: Store | None = None
        self._old = ""  # a failure of an earlier fit
        self._clock = 0.0  # seconds that this process really ran: a stop does not count
        self._ticked = time.monotonic()
        self._tick_took_s = 0.0
        self._signs = -1
        self._limit_s = math.inf
        self._quiet_s = 0.0
        self._others: _Others | None = None
        self._looked_at = self._asked_at = -math.inf
        self._lost_store = ""
        self._heeded_at: float | None = None
        self._told_wait = False

    # -- the thread -----------------------------------------------------------------------------

    def run(self) -> None:
        """Ticks until it is stopped. An error of its own is told once, and ends nothing else."""
        try:
            self._open()
            self._ticked = time.monotonic()
            # At once: a rank that is lost before it has posted would pass for one outside of fit.
            self._tick(0.0)
            while not self._ended.wait(TICK_S):
                began = time.monotonic()
                # After a stop of this whole process it must not think that it had been stuck.
                self._tick(min(began - self._ticked, 3 * TICK_S) + self._tick_took_s)
                self._ticked = time.monotonic()
                self._tick_took_s = min(self._ticked - began, 2 * _STORE_S)
            self._say_goodbye()
        except Exception:  # noqa: BLE001 -- told, and the training goes on without a watchdog
            _print(
                f"dtrain: the watchdog of {self._who} failed and is off now, the training goes "
                f"on:\n{traceback.format_exc()}"
            )
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._calls.join()

    def stop(self) -> None:
        """Ends the thread, which tells that this rank is not in ``fit`` any more."""
        self._ended.set()
        self.join(_STORE_S)
        if self.is_alive():
            end_with("a call of the rendezvous store", self, timeout_s=_AT_EXIT_S)

    def _say_goodbye(self) -> None:
        store = self._store
        if store is not None and not self._lost_store:
            heartbeat = Heartbeat(**self._identity(), number=next(_numbers))
            self._ask(
                "leave", lambda: store.set(heartbeat_key(heartbeat.rank), heartbeat.to_json())
            )
            if not self._lost_store:
                # To connect may take seconds, where names of addresses are looked up.
                self._world.idle_connections.append(store)

    def _open(self) -> None:
        idle = self._world.idle_connections

        def connect() -> None:
            store = idle.pop() if idle else self._connect()
            self._old = _failure_in(store)
            self._store = store  # also where nobody waits for it any more

        self._ask("connect", connect)

    def _tick(self, elapsed: float) -> None:
        self._clock += elapsed
        if self._activity.signs != self._signs:
            self._signs = self._activity.signs
            self._quiet_s = 0.0
            self._others = self._heeded_at = None
            self._told_wait = False
        else:
            self._quiet_s += elapsed
        stack = main_stack(moves=not self._quiet_s)
        if self._activity.signs != self._signs:
            stack = Stack(())  # it has gone on while it was read
        mine = self._beat(stack)
        self._limit_s = mine.limit_s
        self._rearm()
        self._post(mine)
        if self._quiet_s >= self._hang_after_s / 2 and not math.isinf(mine.limit_s):
            self._consult(mine, stack)

    def _rearm(self) -> None:
        """Sets a timer in C, which needs no interpreter, should this thread not run again."""
        if math.isinf(self._limit_s):
            faulthandler.cancel_dump_traceback_later()
        else:
            within_s = max(self._limit_s, _STORE_S) + 2 * TICK_S
            faulthandler.dump_traceback_later(within_s, exit=True, file=2)

    def _beat(self, stack: Stack) -> Heartbeat:
        activity = self._activity
        phase = activity.phase
        limit_s = activity.limit_s(self._hang_after_s, LONG_S)
        if stack.compiles or (phase.reads and self._quiet_s and not stopped_children()):
            limit_s = max(limit_s, LONG_S)
        if stack.debugged:
            limit_s = math.inf
        return Heartbeat(
            **self._identity(),
            number=next(_numbers),
            step=activity.step,
            phase=phase.name,
            at=stack.at if stack.lines else "",
            waits=phase.waits or stack.in_collective,
            quiet_s=self._quiet_s,
            limit_s=limit_s,
            inside=True,
        )

    def _identity(self) -> dict[str, Any]:
        world = self._world
        return {
            "rank": world.rank,
            "host": world.host,
            "pid": os.getpid(),
            "machine": self._machine,
        }

    def _post(self, mine: Heartbeat) -> None:
        if self._store is None:
            self._open()
        store = self._store
        if store is not None:
            self._ask("post", lambda: store.set(heartbeat_key(mine.rank), mine.to_json()))

    # -- something may be wrong -------------------------------------------------------------------

    def _consult(self, mine: Heartbeat, stack: Stack) -> None:
        """The main thread has been quiet for a while: finds out whether anything is wrong."""
        failure = self._ask_for_failure()
        in_vain = mine.waits or mine.quiet_s > mine.limit_s
        if in_vain and failure and failure != self._old:
            self._heed(Failure(**json.loads(failure)))
            return
        seen = self._look(mine) if in_vain else []
        verdict = judge(seen) if seen and mine.quiet_s > self._step_limit_s() else None
        if mine.waits:
            if verdict is not None:
                self._end(verdict, stack)
            elif self._lost_store and mine.quiet_s > mine.limit_s:
                self._end(self._unreachable(mine), stack)
            else:
                self._tell_wait(mine, seen)
        elif mine.quiet_s > mine.limit_s:
            late = mine.quiet_s > mine.limit_s + _GRACE_S
            if verdict is not None and verdict.heartbeat.rank != mine.rank:
                self._end(verdict, stack)
            elif late or not gives_way(mine, seen):
                self._end(stuck(mine, stopped_children()), stack)

    def _ask_for_failure(self) -> str:
        """Reads what another rank left; of many thousands, not in each tick: all of them ask."""
        if self._clock - self._asked_at < self._world.size / 8192:
            return ""
        self._asked_at = self._clock
        return self._read_failure()

    def _step_limit_s(self) -> float:
        """How long to wait before the others are looked at; a slow phase may be slow there."""
        return max(self._hang_after_s, 10 * self._activity.steps.slowest_s)

    def _look(self, mine: Heartbeat) -> list[Seen]:
        """Reads the other ranks; in a large world, few ranks do, and not in each tick."""
        store, size = self._store, self._world.size
        if store is None:
            return []
        turn = looks(mine.rank, size)
        if self._others is None:
            # One that only waits leaves it to others. One that works too long is alone with that.
            if mine.waits and mine.quiet_s < self._hang_after_s / 2 + turn.after_s:
                return []
            self._others = _Others(store, size, self._machine)
        elif self._clock - self._looked_at < turn.every_s:
            return []
        self._looked_at = self._clock
        others, clock = self._others, self._clock
        return self._ask("look", lambda: others.look(clock)) or []

    def _tell_wait(self, mine: Heartbeat, seen: list[Seen]) -> None:
        patience = max(self._step_limit_s(), _PATIENCE_S if self._activity.phase.slow else 0.0)
        first = behind([one for one in seen if one.heartbeat.rank != mine.rank])
        if self._told_wait or first is None or mine.quiet_s < patience:
            return
        self._told_wait = True
        _print(
            f"dtrain: {mine.who} has waited for {mine.quiet_s:.0f} s at {mine.where} for "
            f"{first.who}, which is at {first.where}"
            + (f" for {first.quiet_s:.0f} s (its limit: {first.limit_s:.3g} s)" * first.inside)
        )

    def _unreachable(self, mine: Heartbeat) -> Verdict:
        return Verdict(
            mine,
            f"it waits for other ranks, and the rendezvous store at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}, where ranks post "
            f"where they are, does not answer ({self._lost_store}): its host is down, stopped or "
            "cut off",
        )

    # -- the end ----------------------------------------------------------------------------------

    def _heed(self, failure: Failure) -> None:
        """Another rank has found, or is, the cause. The main thread may have the first word."""
        if self._heeded_at is None:
            self._heeded_at = self._clock
            self._tell(f"dtrain: {self._who} stops, because {failure}")
        elif self._clock - self._heeded_at >= _GRACE_S:
            self._leave()

    def _end(self, verdict: Verdict, stack: Stack) -> None:
        failure = self._record(verdict.failure())
        named = verdict.heartbeat
        if named.rank != self._world.rank or verdict.table:
            told = f"dtrain: {self._who} stops, because {failure}"
        else:
            told = f"dtrain: {named.who} no longer moves, at {named.where}: {verdict.message}"
        self._tell(
            f"{told}\n"
            f"  the main thread of {self._who}, innermost call last:\n{stack.text()}\n"
            f"  The process ends with code {HANG_EXIT_CODE}. If it was slow and not stuck: "
            f"Trainer(..., hang_after_s=...), now {self._hang_after_s:g}; None switches this off."
        )
        # The other ranks read it meanwhile. If the main thread leaves fit by itself, it may.
        if not self._ended.wait(_LINGER_S):
            self._leave()

    def _record(self, failure: Failure) -> Failure:
        """Leaves the failure for the other ranks; returns theirs, where one came first."""
        store = self._store
        if store is None:
            return failure
        text = json.dumps(asdict(failure))

        def leave() -> str:
            # The first one counts. (An expected value that is not there any more is returned.)
            return store.compare_set("failure", self._old, text).decode()

        kept = self._ask("record", leave)
        return Failure(**json.loads(kept)) if kept and kept != self._old else failure

    def _tell(self, report: str) -> None:
        _print(report)
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):
            with suppress(TimeoutError, OSError):  # a disk that hangs, too
                _Bounded().call(lambda: _write_error_file(report), _FLUSH_S)

    def _leave(self) -> None:
        # What the main thread holds (a lock of stdout's) must not keep the process.
        with suppress(TimeoutError, OSError, ValueError):
            _Bounded().call(_flush, _FLUSH_S)
        # Loaders' workers leave with their parent, unless they are stopped: nothing may be left.
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(HANG_EXIT_CODE)

    # -- a broken connection, told by the main thread ---------------------------------------------

    def find_lost(self) -> Failure | None:
        """Returns the failure that broke a connection; called from the main thread.

        It waits until all other ranks have posted anew, so that none of them is to blame, or
        until one has not for too long. In a large world only the first who
        come look; the others wait for what those find, and look only if that is nothing.
        """
        store = self._store
        if store is None or self._lost_store:
            return None
        others = _Others(store, self._world.size, self._machine)
        began = time.monotonic()
        first: list[Seen] = []
        size = self._world.size
        is_early = size <= ALL_LOOK or self._is_among_the_first(store)
        from_s = 0.0 if is_early else _GRACE_S + 2 * TICK_S
        while (now := time.monotonic()) - began < from_s + _GRACE_S + TICK_S:
            self._activity.enter(_FINDING_OUT)
            text = self._read_failure()
            if text and text != self._old:
                failure = Failure(**json.loads(text))
                return failure if failure.rank != self._world.rank else None
            if now - began < from_s:
                self._ended.wait(TICK_S)
                continue
            seen = self._look_at(others, now)
            if self._lost_store:
                return None
            verdict = judge(seen, silent_s=_SILENT_S)
            if verdict is not None:
                return self._record(verdict.failure())
            first = first or seen
            numbers = {one.heartbeat.rank: one.heartbeat.number for one in first}
            if all(
                one.heartbeat.inside and one.heartbeat.number > numbers[one.heartbeat.rank]
                for one in seen
            ):
                return None
            # Of 16,384 ranks, once a second: three looks until the silent one is known.
            self._ended.wait(max(TICK_S / 2, size / 16384))
        return None

    def _look_at(self, others: _Others, now: float) -> list[Seen]:
        seen = self._ask("look", lambda: others.look(now)) or []
        return [one for one in seen if one.heartbeat.rank != self._world.rank]

    def _is_among_the_first(self, store: Store) -> bool:
        came = self._ask("looking", lambda: store.add("looking", 1))
        return came is not None and came <= LOOKERS

    # -- the store --------------------------------------------------------------------------------

    def _read_failure(self) -> str:
        store = self._store
        return "" if store is None else self._ask("read", lambda: _failure_in(store)) or ""

    def _ask(self, what: str, call: Callable[[], T]) -> T | None:
        """Calls the store; None where it does not answer, which is remembered."""
        if threading.current_thread() is self:
            self._rearm()
        try:
            answer = self._calls.call(call, TICK_S if self._lost_store else _STORE_S)
        except (RuntimeError, TimeoutError) as lost:
            self._lost_store = self._lost_store or f"{what}: {lost}"
            return None
        self._lost_store = ""
        return answer

    @property
    def _who(self) -> str:
        return f"rank {self._world.rank} on {self._world.host}"


class _Bounded:
    """Runs calls in a thread of their own, and waits for none longer than its deadline.

    A client of the store waits beyond its time-out where the host is stopped.
    """

    def __init__(self) -> None:
        self._late: threading.Thread | None = None
        self._lock = threading.Lock()

    def call(self, fn: Callable[[], T], timeout_s: float) -> T:
        """Returns what ``fn`` returns.

        Raises:
            TimeoutError: it did not return in time, or an earlier call has not yet.
        """
        with self._lock:
            if self._late is not None:
                self._late.join(timeout_s)
                if self._late.is_alive():
                    raise TimeoutError(f"no answer to an earlier call in {timeout_s:g} s")
                self._late = None
            results: list[T] = []
            errors: list[Exception] = []

            def run() -> None:
                try:
                    results.append(fn())
                except Exception as error:  # noqa: BLE001 -- raised where it was called
                    errors.append(error)

            thread = threading.Thread(target=run, name="dtrain watchdog call", daemon=True)
            thread.start()
            thread.join(timeout_s)
            if thread.is_alive():
                self._late = thread
                raise TimeoutError(f"no answer in {timeout_s:g} s")
            if errors:
                raise errors[0]
            return results[0]

    def join(self) -> None:
        """Waits for a call that did not return in time."""
        if self._late is not None:
            self._late.join()


def _failure_in(store: Store) -> str:
    return store.get("failure").decode() if store.check(["failure"]) else ""


def _print(report: str) -> None:
    """Writes to stderr, past Python's buffer, whose lock the main thread may hold."""
    # A full pipe that nobody reads must not keep the watchdog from its work.
    with suppress(TimeoutError, OSError):
        _Bounded().call(lambda: os.write(2, f"{report}\n".encode()), _FLUSH_S)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _write_error_file(report: str) -> None:
    """Leaves the report where torchrun looks for the cause of a job's failure."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    try:
        raise HangError(report)  # what is recorded has a traceback
    except HangError as error:
        get_error_handler().record_exception(error)
