"""Signals that ask a run to leave: a flag is set, and the run saves and ends in order."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# They ask for nothing else, and would by default kill the process.
_SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)
#: What schedulers send before they take a machine away, and Ctrl-C.
SIGNALS = (signal.SIGTERM, *_SCHEDULERS, signal.SIGINT)


class Signals:
    """Turns each signal into one call of ``ask`` with its name, and puts the old handlers back.

    USR1 and USR2 stay harmless: a scheduler may have sent one while the run came to its end, and
    a run that is finished must not be killed for it.

    ``ask`` must do no more than take note: the main thread may be anywhere. A second Ctrl-C ends
    the process at once, with exit code 130. A signal for which the script has a handler of its
    own, or which it ignores, is left alone.

    Ranks: all, local; one rank's signal suffices.
    """

    def __init__(self, ask: Callable[[str], None]) -> None:
        self._ask = ask
        self._before: dict[int, Any] = {}
        self._seen: set[int] = set()
        self._process = os.getpid()

    def __enter__(self) -> "Signals":
        # Python lets only the main thread set handlers; elsewhere the caller's stay.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.default_int_handler, _too_late):
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            late = number in _SCHEDULERS and before is signal.SIG_DFL
            signal.signal(number, _too_late if late else before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader worker has inherited the handler: its parent decides
        if number not in self._seen:
            self._seen.add(number)
            self._ask(signal.Signals(number).name)
        elif number == signal.SIGINT:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + signal.SIGINT)


def _too_late(number: int, frame: FrameType | None) -> None:
    """What a scheduler has asked for is done already: the run has ended."""
