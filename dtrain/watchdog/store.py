"""What the watchdogs of all ranks tell one another; no call of the store hangs the watchdog."""

import faulthandler
import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict
from typing import Any, TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]

from dtrain.distributed import Heartbeat, World, heartbeat_key, look_up, this_machine
from dtrain.errors import Failure
from dtrain.watchdog.judgement import LOOKERS, Seen

T = TypeVar("T")

TICK_S = 0.5  # how often the watchdog looks
CALL_S = 3.0  # a call of the store that takes longer will not come back
# Of that many keys the store takes 0.7 us each, of 10,000 in one call 10 us each.
KEYS_AT_ONCE = 256


class Bounded:
    """Runs calls in a thread of their own, and waits for none longer than its deadline.

    A client of the store waits beyond its time-out where the host is stopped.
    """

    def __init__(self) -> None:
        self._last: Future[Any] = Future()
        self._last.set_result(None)
        self._lock = threading.Lock()

    def call(self, fn: Callable[[], T], timeout_s: float) -> T:
        """Returns what ``fn`` does; TimeoutError where it, or an earlier call, does not in time."""
        with self._lock:
            if not wait([self._last], timeout_s).done:
                raise TimeoutError(f"no answer to an earlier call in {timeout_s:g} s")
            call: Future[T] = Future()
            self._last = call
            name = "dtrain watchdog call"
            threading.Thread(target=_fulfil, args=(call, fn), name=name, daemon=True).start()
            if not wait([call], timeout_s).done:
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


def arm_timer(limit_s: float) -> None:
    """Sets a timer in C, which needs no interpreter, should the calling thread not run again."""
    if math.isinf(limit_s):
        faulthandler.cancel_dump_traceback_later()
    else:
        within_s = max(limit_s, CALL_S) + 2 * TICK_S
        faulthandler.dump_traceback_later(within_s, exit=True, file=2)


class WatchdogStore:
    """A connection of the watchdog's own, each call of which has a deadline."""

    def __init__(self, world: World, connect: Callable[[], Store]) -> None:
        self.store: Store | None = None  # once it is open
        self.lost = ""  # why the store did not answer the last call, if it did not
        self.limit_s = math.inf  # how long the watchdog's thread may be stuck, besides a call
        self._idle, self._connect = world.idle_connections, connect
        self._watcher = 0
        self.calls = Bounded()
        self._old = ""  # a failure of an earlier fit

    def open(self) -> None:
        """Connects, or takes a connection that an earlier watchdog has left.

        The thread that calls this is the one that must not be stuck.
        """
        self._watcher = threading.get_ident()

        def connect() -> None:
            if self.store is not None:
                return  # an earlier call has connected after all
            store = self._idle.pop() if self._idle else self._connect()
            self._old = _failure_in(store)
            self.store = store  # also where nobody waits for it any more

        self._call("connect", connect)

    def post(self, mine: Heartbeat) -> None:
        """Leaves a heartbeat for the others."""
        if self.store is None:
            self.open()
        self._ask("post", lambda store: store.set(heartbeat_key(mine.rank), mine.to_json()))

    def close(self, last: Heartbeat) -> None:
        """Leaves the ``last`` heartbeat, and the connection to a later watchdog."""
        if self.store is not None and not self.lost:
            self.post(last)
            if not self.lost:
                # To connect may take seconds, where names of addresses are looked up.
                self._idle.append(self.store)

    def look(self, others: "Others", now: float) -> list[Seen]:
        """Returns all ranks as ``others`` see them; none where the store does not answer."""
        return self._ask("look", lambda store: others.look(store, now)) or []

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
        if threading.get_ident() == self._watcher:
            arm_timer(self.limit_s)
        try:
            answer = self.calls.call(call, TICK_S if self.lost else CALL_S)
        except (RuntimeError, TimeoutError) as lost:
            self.lost = self.lost or f"{what}: {lost}"
            return None
        self.lost = ""
        return answer


class Others:
    """The other ranks, read while something seems wrong."""

    def __init__(self, size: int, machine: str | None = None) -> None:
        self._size = size
        self._machine = this_machine() if machine is None else machine
        # The last post of each, and since when it is there, by this rank's clock.
        self._posts: dict[int, tuple[Heartbeat, float]] = {}

    def look(self, store: Store, now: float) -> list[Seen]:
        """Reads all ranks' posts; the clock of ``now`` stands still while this process does."""
        for first in range(0, self._size, KEYS_AT_ONCE):
            some = range(first, min(first + KEYS_AT_ONCE, self._size))
            texts = store.multi_get([heartbeat_key(rank) for rank in some])
            for rank, heartbeat in zip(some, map(Heartbeat.from_json, texts), strict=True):
                if rank not in self._posts or self._posts[rank][0].number != heartbeat.number:
                    self._posts[rank] = heartbeat, now
        return [
            Seen(heartbeat, now - since, look_up(heartbeat, self._machine))
            for heartbeat, since in self._posts.values()
        ]


def _failure_in(store: Store) -> str:
    return store.get("failure").decode() if store.check(["failure"]) else ""
