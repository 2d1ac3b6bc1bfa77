"""How a process ends: in order, or with an error.

Ranks: all, local.
"""

import atexit
import os
import sys
import threading


def end_with(what: str, *threads: threading.Thread, timeout_s: float) -> None:
    """Has the interpreter wait for ``threads``, which do ``what``, in turn before it ends.

    While it ends, it takes itself away from threads that ask for its lock. One that does so as it
    comes back from torch's code (a collective, a call of the rendezvous store) aborts the process:
    "terminate called without an active exception". A thread that is stuck there is not waited for
    longer than ``timeout_s``; the process then ends at once, with code 1.
    """

    def wait() -> None:
        for thread in threads:
            thread.join(timeout_s)
        if any(thread.is_alive() for thread in threads):
            sys.stderr.write(f"dtrain: {what} is stuck, and is left; the process ends with 1\n")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    atexit.register(wait)


def is_failing() -> bool:
    """Says whether the interpreter ends with an uncaught error."""
    last_error = getattr(sys, "last_exc", None)  # since Python 3.12
    return last_error is not None or getattr(sys, "last_value", None) is not None
