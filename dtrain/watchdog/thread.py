"""The watchdog's thread: a rank that no longer moves is named on every rank, and the run ends.

One daemon thread per rank, while ``fit`` or ``evaluate`` runs. Twice a second it reads where the
main thread is (its ``Activity``), and posts that in the rendezvous store. It alone uses its
connection. What a report looks like is in docs/hangs.md.
"""

import itertools
import math
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from torch.distributed import Store  # type: ignore[attr-defined]

from dtrain.distributed import Heartbeat, Phase, World, end_with, stopped_children, this_machine
from dtrain.errors import ConfigError, DtrainError, Failure, HangError, RemoteError
from dtrain.watchdog.judgement import ALL_LOOK, Blame, Seen, behind, gives_way, judge, looks, stuck
from dtrain.watchdog.stacks import Stack, main_stack
from dtrain.watchdog.store import CALL_S, TICK_S, Bounded, Others, WatchdogStore, arm_timer

HANG_AFTER_S = 5.0  # the default: a step may take this long, or ten times the slowest recent one
HANG_EXIT_CODE = 70  # of a process that the watchdog ends
# How long something may take outside of a step, in a fit's first, while torch compiles, and for
# data, unless a worker is stopped.
LONG_S = 300.0
GRACE_S = 3.0  # for the main thread to raise what the watchdog has found
_FLUSH_S = 1.0  # for what a report is written to
_AT_EXIT_S = 10.0  # for a call that is still under way when the process ends
_LINGER_S = 1.5  # for the other ranks to read it, before this one's end ends them too
_PATIENCE_S = 30.0  # after which a wait in a slow phase is worth a line
_SILENT_S = 2.5  # once connections have broken, a rank that posts nothing this long is the cause
_FINDING_OUT = Phase("finding out which rank was lost", slow=True)

# Posts of all watchdogs of this process, so that a later fit's are told from an earlier one's.
_numbers = itertools.count(1)


class Watchdog:
    """Watches this rank's main thread while it is entered, and the other ranks where it waits.

    In a world of one, or where ``hang_after_s`` (see :class:`dtrain.Trainer`) is None, there is
    nothing to watch. Raises ConfigError where that is less than a second.

    Ranks: all, local; it talks to the rendezvous store, and never to a rank.
    """

    def __init__(self, world: World, hang_after_s: float | None = HANG_AFTER_S) -> None:
        if hang_after_s is not None and not hang_after_s >= 1:
            raise ConfigError(
                f"hang_after_s={hang_after_s}: must be at least 1 second, or None for no watchdog"
            )
        self._world, self._activity = world, world.comm.activity
        self._hang_after_s = hang_after_s
        self._watch: Watch | None = None
        self._depth = 0

    def __enter__(self) -> "Watchdog":
        self._depth += 1
        if self._activity.watched:
            return self  # an evaluation inside of fit
        self._activity.restart()
        if self._hang_after_s is not None and self._world.connect is not None:
            self._watch = Watch(self._world, self._hang_after_s, self._world.connect)
            self._activity.watched = True
            self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._watch is not None and not self._depth:
            self._activity.watched = False
            self._watch.stop()
            self._watch = None

    def explain(self, error: BaseException) -> DtrainError | None:
        """Returns which rank's end is why this rank lost the others, if that is what happened.

        Waits a few seconds where it takes that to see which rank posts nothing any more.
        """
        if self._watch is None or not self._world.comm.may_be_broken(error):
            return None
        failure = self._watch.find_lost()
        return None if failure is None else RemoteError(str(failure))


class Watch(threading.Thread):
    """The thread."""

    def __init__(self, world: World, hang_after_s: float, connect: Callable[[], Store]) -> None:
        super().__init__(name="dtrain watchdog", daemon=True)
        self._world, self._activity = world, world.comm.activity
        self._hang_after_s = hang_after_s
        self._who = f"rank {world.rank} on {world.host}"
        self._outside = Heartbeat(world.rank, world.host, os.getpid(), this_machine(), number=0)
        self._told = WatchdogStore(world, connect)
        self._ended = threading.Event()
        self._clock = 0.0  # seconds that this process really ran: a stop does not count
        self._signs = -1
        self._quiet_s = 0.0
        self._others: Others | None = None
        self._looked_at = self._asked_at = -math.inf
        self._heeded_at: float | None = None
        self._told_wait = False

    def run(self) -> None:
        """Ticks until it is stopped. An error of its own is told once, and ends nothing else."""
        try:
            self._told.open()
            ticked, took_s = time.monotonic(), 0.0
            # At once: a rank that is lost before it has posted would pass for one outside of fit.
            self._tick(0.0)
            while not self._ended.wait(TICK_S):
                began = time.monotonic()
                # After a stop of this whole process it must not think that it had been stuck.
                self._tick(min(began - ticked, 3 * TICK_S) + took_s)
                ticked = time.monotonic()
                took_s = min(ticked - began, 2 * CALL_S)
            self._told.close(replace(self._outside, number=next(_numbers)))
        except Exception:  # noqa: BLE001 -- told, and the training goes on without a watchdog
            _print_report(
                f"dtrain: the watchdog of {self._who} failed and is off now, the training goes "
                f"on:\n{traceback.format_exc()}"
            )
        finally:
            arm_timer(math.inf)
            self._told.calls.join()  # one that is still under way

    def stop(self) -> None:
        """Ends the thread, which tells that this rank is not in ``fit`` any more."""
        self._ended.set()
        self.join(CALL_S)
        if self.is_alive():
            end_with("a call of the rendezvous store", self, timeout_s=_AT_EXIT_S)

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
        mine = self._heartbeat(stack)
        self._told.limit_s = mine.limit_s
        self._told.post(mine)
        if self._quiet_s >= self._hang_after_s / 2 and not math.isinf(mine.limit_s):
            self._consult(mine, stack)

    def _heartbeat(self, stack: Stack) -> Heartbeat:
        phase = self._activity.phase
        limit_s = self._activity.limit_s(self._hang_after_s, LONG_S)
        if stack.compiles or (phase.reads and self._quiet_s and not stopped_children()):
            limit_s = max(limit_s, LONG_S)
        if stack.debugged:
            limit_s = math.inf
        return replace(
            self._outside,
            number=next(_numbers),
            step=self._activity.step,
            phase=phase.name,
            at=stack.at if stack.lines else "",
            waits=phase.waits or stack.in_collective,
            quiet_s=self._quiet_s,
            limit_s=limit_s,
            inside=True,
        )

    # -- something may be wrong -------------------------------------------------------------------

    def _consult(self, mine: Heartbeat, stack: Stack) -> None:
        """The main thread has been quiet for a while: finds out whether anything is wrong."""
        too_long = mine.quiet_s > mine.limit_s
        if not (mine.waits or too_long):
            return
        failure = self._ask_for_failure()
        if failure is not None:
            self._heed(failure)
            return
        seen = self._look(mine)
        blame = judge(seen) if seen and mine.quiet_s > self._step_limit_s() else None
        if blame is not None and (mine.waits or blame.heartbeat.rank != mine.rank):
            self._end(blame, stack)
        elif mine.waits and self._told.lost and too_long:
            store = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            why = (
                f"it waits for other ranks, and the rendezvous store at {store}, where ranks post "
                f"where they are, does not answer ({self._told.lost}): its host is down, stopped "
                "or cut off"
            )
            self._end(Blame(mine, why), stack)
        elif mine.waits:
            self._tell_wait(mine, seen)
        elif mine.quiet_s > mine.limit_s + GRACE_S or not gives_way(mine, seen):
            self._end(stuck(mine, stopped_children()), stack)

    def _ask_for_failure(self) -> Failure | None:
        """Reads what another rank left; of many thousands, not in each tick: all of them ask."""
        if self._clock - self._asked_at < self._world.size / 8192:
            return None
        self._asked_at = self._clock
        return self._told.new_failure()

    def _step_limit_s(self) -> float:
        """How long to wait before the others are looked at; a slow phase may be slow there."""
        return max(self._hang_after_s, 10 * self._activity.steps.slowest_s)

    def _look(self, mine: Heartbeat) -> list[Seen]:
        """Reads the other ranks; in a large world, few ranks do, and not in each tick."""
        turn = looks(mine.rank, self._world.size)
        if self._others is None:
            # One that only waits leaves it to others. One that works too long is alone with that.
            if mine.waits and mine.quiet_s < self._hang_after_s / 2 + turn.after_s:
                return []
            self._others = Others(self._world.size)
        elif self._clock - self._looked_at < turn.every_s:
            return []
        self._looked_at = self._clock
        return self._told.look(self._others, self._clock)

    def _tell_wait(self, mine: Heartbeat, seen: list[Seen]) -> None:
        patience = max(self._step_limit_s(), _PATIENCE_S if self._activity.phase.slow else 0.0)
        first = behind([one for one in seen if one.heartbeat.rank != mine.rank])
        if self._told_wait or first is None or mine.quiet_s < patience:
            return
        self._told_wait = True
        _print_report(
            f"dtrain: {mine.who} has waited for {mine.quiet_s:.0f} s at {mine.where} for "
            f"{first.who}, which is at {first.where}"
            + (f" for {first.quiet_s:.0f} s (its limit: {first.limit_s:.3g} s)" * first.inside)
        )

    # -- the end ----------------------------------------------------------------------------------

    def _heed(self, failure: Failure) -> None:
        """Another rank has found, or is, the cause. The main thread may have the first word."""
        if self._heeded_at is None:
            self._heeded_at = self._clock
            self._tell(f"dtrain: {self._who} stops, because {failure}")
        elif self._clock - self._heeded_at >= GRACE_S:
            self._leave()

    def _end(self, blame: Blame, stack: Stack) -> None:
        failure = self._told.record(blame.failure())
        named = blame.heartbeat
        if named.rank != self._world.rank or blame.table:
            told = f"dtrain: {self._who} stops, because {failure}"
        else:
            told = f"dtrain: {named.who} no longer moves, at {named.where}: {blame.message}"
        self._tell(
            f"{told}\n"
            f"  the main thread of {self._who}, innermost call last:\n{stack.text()}\n"
            f"  The process ends with code {HANG_EXIT_CODE}. If it was slow and not stuck: "
            f"Trainer(..., hang_after_s=...), now {self._hang_after_s:g}; None switches this off."
        )
        # The other ranks read it meanwhile. If the main thread leaves fit by itself, it may.
        if not self._ended.wait(_LINGER_S):
            self._leave()

    def _tell(self, report: str) -> None:
        def tell_launcher() -> None:
            try:
                raise HangError(report)  # what is recorded has a traceback
            except HangError as error:
                self._world.tell_launcher(error)

        _print_report(report)
        _write_out(tell_launcher)

    def _leave(self) -> None:
        # What the main thread holds (a lock of stdout's) must not keep the process.
        _write_out(lambda: (sys.stdout.flush(), sys.stderr.flush()))
        # Loaders' workers leave with their parent, unless they are stopped: nothing may be left.
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(HANG_EXIT_CODE)

    # -- asked by the main thread -----------------------------------------------------------------

    def find_lost(self) -> Failure | None:
        """Returns the failure that broke a connection.

        It waits until all other ranks have posted anew, so that none of them is to blame, or until
        one has not for too long. In a large world only the first who come look; the others wait
        for what those find, and look only if that is nothing.
        """
        told, world = self._told, self._world
        if told.store is None or told.lost:
            return None
        others = Others(world.size)
        began = time.monotonic()
        first: dict[int, int] = {}
        is_early = world.size <= ALL_LOOK or told.is_among_the_first()
        from_s = 0.0 if is_early else GRACE_S + 2 * TICK_S
        while (now := time.monotonic()) - began < from_s + GRACE_S + TICK_S:
            self._activity.enter(_FINDING_OUT)
            failure = told.new_failure()
            if failure is not None:
                return failure if failure.rank != world.rank else None
            if now - began < from_s:
                self._ended.wait(TICK_S)
                continue
            seen = [one for one in told.look(others, now) if one.heartbeat.rank != world.rank]
            if told.lost:
                return None
            blame = judge(seen, silent_s=_SILENT_S)
            if blame is not None:
                return told.record(blame.failure())
            posts = [one.heartbeat for one in seen]
            first = first or {post.rank: post.number for post in posts}
            if all(post.inside and post.number > first[post.rank] for post in posts):
                return None
            # Of 16,384 ranks, once a second: three looks until the silent one is known.
            self._ended.wait(max(TICK_S / 2, world.size / 16384))
        return None


def _write_out(call: Callable[[], object]) -> None:
    """Calls what writes to a disk or a pipe; one that takes nothing any more holds up nobody."""
    with suppress(TimeoutError, OSError, ValueError):
        Bounded().call(call, _FLUSH_S)


def _print_report(report: str) -> None:
    """Writes to stderr, past Python's buffer, whose lock the main thread may hold."""
    _write_out(lambda: os.write(2, f"{report}\n".encode()))
