"""What keeps the watchdog itself from hanging: deadlines for its calls, and for its thread.

Ranks: all, local.
"""

import faulthandler
import math
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

TICK_S = 0.5  # how often the watchdog looks
CALL_S = 3.0  # a call of the store that takes longer will not come back
_FLUSH_S = 1.0


class Bounded:
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
