"""What the watchdogs of all ranks tell one another; no call of the store hangs the watchdog."""

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict
from typing import Any, TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]

from dtrain.distributed import (
    Heartbeat,
    Process,
    World,
    heartbeat_key,
    look_up,
    read_all,
    this_machine,
)
from dtrain.errors import Failure
from dtrain.watchdog.judgement import LOOKERS, NAME_S, Seen
from dtrain.watchdog.reach import call as call_places

T = TypeVar("T")

TICK_S = 0.5  # how often the watchdog looks
CALL_S = 3.0  # a call of the store that takes longer will not come back
#: A longer time between two looks at the clock is one in which this process was stopped.
LONGEST_S = 3 * TICK_S
_ASK_AGAIN_S = 10.0  # a rank that is silent and lives is called again


class RunningClock:
    """Tells the seconds that this process ran: while it, or the machine, is stopped, none pass.

    For that it must be looked at now and then. Each look takes a microsecond.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at, self._ran_s = time.monotonic(), 0.0

    def now(self) -> float:
        """Returns the seconds since it was made."""
        with self._lock:
            now = time.monotonic()
            self._ran_s += min(now - self._at, LONGEST_S)
            self._at = now
            return self._ran_s

    def wait(self, call: "Future[Any]", timeout_s: float) -> bool:
        """Waits for ``call``; says whether it came in so many of these seconds."""
        until = self.now() + timeout_s
        while not wait([call], max(0.0, min(TICK_S, until - self.now()))).done:
            if self.now() >= until:
                return False
        return True


class Bounded:
    """Runs calls in a thread of their own, and waits for none longer than its deadline.

    A client of the store waits beyond its time-out where the host is stopped.
    """

    def __init__(self, clock: RunningClock | None = None) -> None:
        self._last: Future[Any] = Future()
        self._last.set_result(None)
        self._lock = threading.Lock()
        self._clock = clock or RunningClock()

    def call(self, fn: Callable[[], T], timeout_s: float) -> T:
        """Returns what ``fn`` does; TimeoutError where it, or an earlier call, does not in time."""
        with self._lock:
            if not self._clock.wait(self._last, timeout_s):
                raise TimeoutError(f"no answer to an earlier call in {timeout_s:g} s")
            call: Future[T] = Future()
            self._last = call
            name = "dtrain watchdog call"
            threading.Thread(target=_fulfil, args=(call, fn), name=name, daemon=True).start()
            if not self._clock.wait(call, timeout_s):
                raise TimeoutError(f"no answer in {timeout_s:g} s")
            return call.result()

    def join(self) -> None:
        """Waits for a call that did not return in time."""
        wait([self._last])


def _fulfil(call: "Future[T]", fn: Callable[[], T]) -> None:
    try:
        call.set_result(fn())
    except Exception as error:  # noqa: BLE001 -- raised where it was called
        call.set_exception(error)


class WatchdogStore:
    """A connection of the watchdog's own, each call of which has a deadline."""

    def __init__(self, world: World, connect: Callable[[], Store]) -> None:
        self.store: Store | None = None  # once it is open
        self.lost = ""  # why the store did not answer the last call, if it did not
        self.lost_at = math.inf  # since when, by that clock
        self._idle, self._connect = world.idle_connections, connect
        self.clock = RunningClock()
        self.calls = Bounded(self.clock)
        self._old = ""  # a failure of an earlier fit

    def open(self) -> None:
        """Connects, or takes a connection that an earlier watchdog has left."""

        def connect() -> None:
            if self.store is not None:
                return  # an earlier call has connected after all
            store = self._idle.pop() if self._idle else self._connect()
            self._old = _failure_in(store)
            self.store = store  # also where nobody waits for it any more

        self._call("connect", connect)

    def post(self, mine: Heartbeat, *, begins: bool = False) -> None:
        """Leaves a heartbeat for the others, perhaps the first of a further fit."""
        if self.store is None:
            self.open()

        def post(store: Store) -> None:
            if begins:
                self._old = _failure_in(store)
            store.set(heartbeat_key(mine.rank), mine.to_json())

        self._ask("post", post)

    def close(self) -> None:
        """Leaves the connection to a later watchdog."""
        if self.store is not None and not self.lost:
            # To connect may take seconds, where names of addresses are looked up.
            self._idle.append(self.store)

    def look(self, others: "Others", now: float, *, silent_s: float = NAME_S) -> list[Seen]:
        """Returns all ranks as ``others`` see them; none where the store does not answer."""
        self._ask("look", lambda store: others.read(store, now))
        return [] if self.lost else others.seen(now, silent_s=silent_s)

    def read(self, ranks: Sequence[int]) -> list[Heartbeat]:
        """Returns the last posts of these ranks; none where the store does not answer."""
        keys = [heartbeat_key(rank) for rank in ranks]
        texts = self._ask("read posts", lambda store: store.multi_get(keys))
        return [Heartbeat.from_json(text) for text in texts or ()]

    def new_failure(self) -> Failure | None:
        """Returns what a rank has left in this fit."""
        return self._new(self._ask("read", _failure_in))

    def record(self, failure: Failure) -> Failure:
        """Leaves the failure for the other ranks; returns theirs, where one came first."""
        old, text = self._old, json.dumps(asdict(failure))
        # The first one counts. (An expected value that is not there any more is returned.)
        kept = self._ask("record", lambda store: store.compare_set("failure", old, text).decode())
        return self._new(kept) or failure

    def is_among_the_first(self) -> bool:
        """Says whether few ranks have asked this before."""
        came = self._ask("looking", lambda store: store.add("looking", 1))
        return came is not None and came <= LOOKERS

    def _new(self, text: str | None) -> Failure | None:
        return Failure(**json.loads(text)) if text and text != self._old else None

    def _ask(self, what: str, call: Callable[[Store], T]) -> T | None:
        """Asks the store, if it is open."""
        store = self.store
        return None if store is None else self._call(what, lambda: call(store))

    def _call(self, what: str, call: Callable[[], T]) -> T | None:
        """Calls the store; None where it does not answer, which is remembered."""
        try:
            answer = self.calls.call(call, TICK_S if self.lost else CALL_S)
        except (RuntimeError, TimeoutError) as lost:
            self.lost = self.lost or f"{what}: {lost}"
            self.lost_at = min(self.lost_at, self.clock.now())
            return None
        self.lost, self.lost_at = "", math.inf
        return answer


class Others:
    """The other ranks, read while something seems wrong."""

    def __init__(self, size: int, machine: str | None = None) -> None:
        self._size = size
        self._machine = this_machine() if machine is None else machine
        # The last post of each, and since when it is there, by this rank's clock.
        self._posts: dict[int, tuple[Heartbeat, float]] = {}
        self._stopped_at: dict[int, float] = {}
        self._called: dict[int, tuple[float, Process]] = {}  # silent ones: when, and what was found

    def read(self, store: Store, now: float) -> None:
        """Reads all ranks' posts; the clock of ``now`` stands still while this process does."""
        texts = read_all(store, [heartbeat_key(rank) for rank in range(self._size)])
        for rank, heartbeat in enumerate(map(Heartbeat.from_json, texts)):
            if rank not in self._posts or self._posts[rank][0].number != heartbeat.number:
                self._posts[rank] = heartbeat, now
                self._called.pop(rank, None)

    def seen(self, now: float, *, silent_s: float = NAME_S) -> list[Seen]:
        """Returns what is known of all ranks; those on other hosts that are silent are called."""
        found = {rank: look_up(post, self._machine) for rank, (post, _) in self._posts.items()}
        for rank, process in found.items():
            if process != "stopped":
                self._stopped_at.pop(rank, None)
        stopped = {
            r: now - self._stopped_at.setdefault(r, now) for r in found if found[r] == "stopped"
        }
        ask: dict[int, tuple[str, int]] = {}
        for rank, (post, since) in self._posts.items():
            silent = post.inside and post.port and now - since > silent_s
            if found[rank] == "unknown" and silent and post.address:
                called_at, answer = self._called.get(rank, (-math.inf, "unknown"))
                found[rank] = answer
                if answer in ("unknown", "runs") and now - called_at > _ASK_AGAIN_S:
                    ask[rank] = post.address, post.port
        if ask:
            answers = call_places(ask)
            self._called |= {rank: (now, answer) for rank, answer in answers.items()}
            found |= answers
        return [
            Seen(post, now - since, found[rank], stopped.get(rank, 0.0))
            for rank, (post, since) in self._posts.items()
        ]


def _failure_in(store: Store) -> str:
    return store.get("failure").decode() if store.check(["failure"]) else ""
