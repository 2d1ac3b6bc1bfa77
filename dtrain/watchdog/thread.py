"""The watchdog's thread: a rank that no longer moves is named on every rank, and the run ends.

One daemon thread per rank, while ``fit`` or ``evaluate`` runs, and a moment longer: where fits are
short, the next one's is there already. Twice a second it reads where the
main thread is (its ``Activity``), and posts that in the rendezvous store. It alone uses its
connection. What a report looks like is in docs/hangs.md.
"""

import itertools
import math
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from torch.distributed import Store  # type: ignore[attr-defined]

from dtrain.distributed import (
    Heartbeat,
    World,
    end_process,
    end_with,
    look_up,
    started,
    stopped_children,
    this_machine,
)
from dtrain.errors import DtrainError, Failure, HangError
from dtrain.watchdog.judgement import (
    NAME_S,
    STOPPED_S,
    Blame,
    Seen,
    behind,
    gives_way,
    judge,
    looks,
    silent,
    stuck,
    table,
)
from dtrain.watchdog.last_resort import Stacks, Timer
from dtrain.watchdog.reach import Door
from dtrain.watchdog.stacks import Stack, main_stack
from dtrain.watchdog.store import CALL_S, TICK_S, Bounded, Others, WatchdogStore
from dtrain.watchdog.turns import Turns

HANG_EXIT_CODE = 70  # of a process that the watchdog ends
# How long what is outside of a step may take, a fit's first step, data, and while torch compiles.
LONG_S = 300.0
GRACE_S = 3.0  # for the main thread to raise what the watchdog has found
_FLUSH_S = 1.0  # for what a report is written to
_AT_EXIT_S = 10.0  # for a call that is still under way when the process ends
_LINGER_S = 1.5  # for the other ranks to read it, before this one's end ends them too
_SOON_S = 0.1  # how soon a rank that has come to where it waits is looked at again
_REST_S = 2.0  # how long the thread waits for another fit
_LOST_S = 8.0  # a store that does not answer for so long will not

# Posts of all watchdogs of this process, so that a later fit's are told from an earlier one's.
_numbers = itertools.count(1)
_fits = itertools.count(1)


class Watch(threading.Thread):
    """The thread."""

    def __init__(self, world: World, hang_after_s: float, connect: Callable[[], Store]) -> None:
        super().__init__(name="dtrain watchdog", daemon=True)
        self._world, self._activity = world, world.comm.activity
        self._hang_after_s = hang_after_s
        self._who = f"rank {world.rank} on {world.host}"
        self._outside = Heartbeat(
            world.rank,
            world.host,
            os.getpid(),
            this_machine(),
            number=0,
            fit=next(_fits),
            started=started(os.getpid()),
        )
        self.told = WatchdogStore(world, connect)
        self._turns = Turns()
        self._posted = self._outside.fit  # of which fit the last post was
        self._clock = 0.0  # seconds that this process really ran: a stop does not count
        self._stacks, self._timer = Stacks(), Timer()
        self._signs = -1
        self._quiet_s = 0.0
        self._others: Others | None = None
        self._looked_at = self._asked_at = -math.inf
        self._failure: Failure | None = None  # what another rank has found, or is
        self._pause_s = TICK_S
        self._why = ""  # it ends, for the run's files
        self._heeded_at: float | None = None
        self._worker_stopped_at: float | None = None
        self._told_wait = False

    def start(self) -> None:
        """Begins; and has a process that is aborted write its stacks, as others may abort it."""
        self._stacks.show()
        super().start()

    def run(self) -> None:
        """Ticks until it is stopped. An error of its own is told once, and ends nothing else."""
        door: Door | None = None
        try:
            self.told.open()
            with suppress(TimeoutError):  # a name may have to be looked up
                door = Bounded().call(Door, CALL_S)
                self._outside = replace(self._outside, address=door.address, port=door.port)
            goes_on = True
            while goes_on:
                # At once: who is lost before it has posted would pass for one outside of fit.
                self._tick()
                while not self._turns.fit_ends(self._pause_s):
                    self._tick()
                    if door is not None:
                        door.clear()
                self._end_cause()
                self._timer.disarm()
                self.told.post(replace(self._outside, number=next(_numbers)))
                goes_on = self._turns.another_begins(_REST_S)
            self.told.close()
        except Exception:  # noqa: BLE001 -- told, and the training goes on without a watchdog
            _print_report(
                f"dtrain: the watchdog of {self._who} failed and is off now, the training goes "
                f"on:\n{traceback.format_exc()}"
            )
        finally:
            self._timer.disarm()
            if door is not None:
                door.close()
            self.told.calls.join()  # one that is still under way

    def rest(self) -> None:
        """A fit has ended in order. Another one may go on with the thread, which ends if none does.

        Nothing is waited for; :meth:`stop` still has to be called before the process ends.
        """
        self._stacks.hide()
        self._turns.rest()

    def go_on(self, hang_after_s: float) -> bool:
        """Another fit begins; returns False where it needs a thread of its own."""

        def prepare() -> None:
            self._hang_after_s = hang_after_s
            self._outside = replace(self._outside, fit=next(_fits))
            self._stacks.show()

        return self.is_alive() and self._turns.go_on(prepare)

    def stop(self) -> None:
        """Ends the thread, which tells that this rank is not in ``fit`` any more."""
        self._stacks.hide()
        self._turns.stop()
        self.join(CALL_S)
        if self.is_alive():
            end_with("a call of the rendezvous store", self, timeout_s=_AT_EXIT_S)

    def _tick(self) -> None:
        now = self.told.clock.now()
        elapsed, self._clock = now - self._clock, now
        if self._activity.signs != self._signs:
            self._signs = self._activity.signs
            self._quiet_s = 0.0
            self._others = self._failure = self._heeded_at = self._worker_stopped_at = None
            self._told_wait = False
        else:
            self._quiet_s += elapsed
        stack = main_stack(moves=not self._quiet_s)
        if self._activity.signs != self._signs:
            stack = Stack(())  # it has gone on while it was read
        mine = self._heartbeat(stack)
        self._timer.arm(max(mine.limit_s, LONG_S), self._clock)
        begins, self._posted = self._posted != mine.fit, mine.fit
        self.told.post(mine, begins=begins)
        # Whoever failed finds out by two posts that this rank waits, and where.
        just_came = mine.waits and not self._quiet_s and self._pause_s == TICK_S
        self._pause_s = _SOON_S if just_came else TICK_S
        if self._quiet_s >= self._name_s / 2 and not math.isinf(mine.limit_s):
            self._consult(mine, stack)

    def _heartbeat(self, stack: Stack) -> Heartbeat:
        phase = self._activity.phase
        limit_s = self._activity.limit_s(self._hang_after_s, LONG_S)
        if stack.compiles or phase.reads:
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
            order=self._activity.order,
            call=stack.call if not phase.waits else phase.call if stack.in_collective else "",
            quiet_s=self._quiet_s,
            limit_s=limit_s,
            inside=True,
        )

    # -- something may be wrong -------------------------------------------------------------------

    def _consult(self, mine: Heartbeat, stack: Stack) -> None:
        """The main thread has been quiet for a while: finds out whether anything is wrong."""
        too_long = mine.quiet_s > mine.limit_s
        workers = stopped_children() if self._activity.phase.reads else []
        if not (mine.waits or too_long or workers):
            return
        failure = self._ask_for_failure()
        if failure is not None:
            self._heed(failure, mine, stack)
            if failure.ends:
                return
        seen = self._look(mine)
        if not mine.waits:
            if self._are_stopped(workers):
                self._end(stuck(mine, workers), stack)
            elif too_long and (mine.quiet_s > mine.limit_s + GRACE_S or not gives_way(mine, seen)):
                self._end(stuck(mine), stack)
        elif mine.quiet_s < self._name_s:
            return
        elif (blame := judge(seen) if seen else None) is not None:
            self._end(blame, stack, seen)
        elif self._clock - self.told.lost_at > _LOST_S:
            address = os.environ.get("MASTER_ADDR", "")  # none where the script opened the group
            at = f" at {address}:{os.environ.get('MASTER_PORT')}" if address else ""
            why = (
                f"it waits for other ranks, and the rendezvous store{at}, where ranks post "
                f"where they are, does not answer ({self.told.lost}): its host is down, stopped "
                "or cut off"
            )
            self._end(Blame(mine, why), stack)
        else:
            self._tell_wait(mine, seen)

    def _are_stopped(self, workers: list[int]) -> bool:
        """Says whether some have been for so long that they will not go on."""
        if not workers or self._worker_stopped_at is None:
            self._worker_stopped_at = self._clock if workers else None
            return False
        return self._clock - self._worker_stopped_at >= STOPPED_S

    def _ask_for_failure(self) -> Failure | None:
        """Reads what another rank left; of many thousands, not in each tick: all of them ask."""
        if self._clock - self._asked_at < self._world.size / 8192:
            return None
        self._asked_at = self._clock
        return self.told.new_failure()

    @property
    def _name_s(self) -> float:
        """How long to wait before it is told for whom, and what is known to be wrong."""
        return min(NAME_S, self._hang_after_s)

    def _look(self, mine: Heartbeat) -> list[Seen]:
        """Reads the other ranks; in a large world, few ranks do, and not in each tick."""
        turn = looks(mine.rank, self._world.size)
        if self._others is None:
            # One that only waits leaves it to others. One that works too long is alone with that.
            if mine.waits and mine.quiet_s < self._name_s / 2 + turn.after_s:
                return []
            self._others = Others(self._world.size)
        elif self._clock - self._looked_at < turn.every_s:
            return []
        self._looked_at = self._clock
        return self.told.look(self._others, self._clock)

    def _tell_wait(self, mine: Heartbeat, seen: list[Seen]) -> None:
        # Where steps take long, a rank may wait long in each of them.
        laps = self._activity.laps
        patience_s = max(self._name_s, 2 * laps.slowest_s if laps else 0.0)
        if self._told_wait or not seen or mine.quiet_s < patience_s:
            return
        self._told_wait = True
        others = [one for one in seen if one.heartbeat.rank != mine.rank]
        if (mute := silent(others)) is not None:
            why = " (a call in C that keeps the interpreter?)"
            why = ": its process is stopped" if mute.process == "stopped" else why
            whom = f"{mute.heartbeat.who}, of which nothing was heard for {mute.stale_s:.0f} s{why}"
            whom += f"; it was last at {mute.heartbeat.where}"
        elif (first := behind(others)) is not None:
            whom = f"{first.who}, which is at {first.where}"
            whom += f" for {first.quiet_s:.0f} s (its limit: {first.limit_s:.3g} s)" * first.inside
        else:
            whom = f"the others, which wait, too:\n{table([one.heartbeat for one in others])}"
        _print_report(
            f"dtrain: {mine.who} has waited for {mine.quiet_s:.0f} s at {mine.where} for {whom}"
        )

    # -- the end ----------------------------------------------------------------------------------

    def _heed(self, failure: Failure, mine: Heartbeat, stack: Stack) -> None:
        """A rank has found, or is, the cause. The main thread may have the first word.

        As long as that rank is in ``fit``, the news is still on its way to the main thread.
        """
        own = failure.rank == self._world.rank
        ends = failure.ends or mine.quiet_s > mine.limit_s or (not own and self._left(failure))
        if self._failure is None and (ends or mine.quiet_s >= self._name_s):
            self._failure = failure
            self._tell(failure, self._words(failure) + f"\n{self._stack(stack)}" * own)
        if not ends:
            return
        if self._heeded_at is None:
            self._heeded_at = self._clock
        elif self._clock - self._heeded_at >= GRACE_S:
            self._leave()

    def _left(self, failure: Failure) -> bool:
        """Says whether a rank that failed is not in this fit any more."""
        return any(
            not (post.inside and post.fit == self._outside.fit)
            or look_up(post, self._outside.machine) == "gone"
            for post in self.told.read([failure.rank])
        )

    def _words(self, failure: Failure) -> str:
        if failure.rank != self._world.rank:
            return f"dtrain: {self._who} stops, because {failure}"
        return f"dtrain: {str(failure).replace(' failed in ', ' stops: it failed in ', 1)}"

    def _stack(self, stack: Stack) -> str:
        return f"  the main thread of {self._who}, innermost call last:\n{stack.text()}"

    def _end(self, blame: Blame, stack: Stack, seen: Sequence[Seen] = ()) -> None:
        named = blame.heartbeat
        self._failure = failure = self.told.record(blame.failure())
        if failure.rank != self._world.rank:
            report = self._words(failure)
        elif named.rank == failure.rank:
            told = f"dtrain: {named.who} no longer moves, at {named.where}: {blame.message}"
            report = "\n".join([told, *filter(None, [blame.table]), self._stack(stack)])
        else:
            report = self._words(failure)
        if blame.slow:
            report += (
                "\n  If it was slow and not stuck: Trainer(..., hang_after_s=...), now "
                f"{self._hang_after_s:g}; None switches this off."
            )
        self._tell(failure, report)
        # The other ranks read it meanwhile. If the main thread leaves fit by itself, it may.
        if not self._turns.fit_ends(_LINGER_S):
            self._end_cause(held=blame.held)
            self._leave()

    def _end_cause(self, *, held: bool = False) -> None:
        """Ends the process that is the cause, if it is on this host and cannot do so itself.

        Else a launcher waits for it, torchrun for half a minute.
        """
        failure, self._failure = self._failure, None
        if failure is None or not failure.ends or failure.rank == self._world.rank:
            return
        for post in self.told.read([failure.rank]):
            if post.inside:
                end_process(post, self._outside.machine, held=held)

    def _tell(self, failure: Failure, report: str) -> None:
        own = failure.rank == self._world.rank
        self._why = f"{failure.kind}: {failure.message}" if own else f"RemoteError: {failure}"

        def tell_launcher() -> None:
            try:
                raise HangError(report)  # what is recorded has a traceback
            except HangError as error:
                self._world.tell_launcher(error)

        _print_report(report)
        _write_out(tell_launcher)

    def _leave(self) -> None:
        self._end_cause()
        _print_report(
            f"dtrain: {self._who} ends with code {HANG_EXIT_CODE}: its main thread waits in vain"
        )
        _write_out(lambda: self._activity.leave_word(self._why))
        # What the main thread holds (a lock of stdout's) must not keep the process.
        _write_out(lambda: (sys.stdout.flush(), sys.stderr.flush()))
        # Loaders' workers leave with their parent, unless they are stopped: nothing may be left.
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(HANG_EXIT_CODE)


def _write_out(call: Callable[[], object]) -> None:
    """Calls what writes to a disk or a pipe; one that takes nothing any more holds up nobody."""
    with suppress(TimeoutError, OSError, ValueError, DtrainError):
        Bounded().call(call, _FLUSH_S)


def _print_report(report: str) -> None:
    """Writes to stderr, past Python's buffer, whose lock the main thread may hold."""
    _write_out(lambda: os.write(2, f"{report}\n".encode()))
