"""What keeps the watchdog itself from hanging: deadlines for its calls, and for its thread."""

import faulthandler
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

TICK_S = 0.5  # how often the watchdog looks
CALL_S = 3.0  # a call of the store that takes longer will not come back
_FLUSH_S = 1.0


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


def write_out(call: Callable[[], object]) -> None:
    """Calls what writes to a disk or a pipe; one that takes nothing any more holds up nobody."""
    with suppress(TimeoutError, OSError, ValueError):
        Bounded().call(call, _FLUSH_S)


def print_report(report: str) -> None:
    """Writes to stderr, past Python's buffer, whose lock the main thread may hold."""
    write_out(lambda: os.write(2, f"{report}\n".encode()))
