"""A rendezvous store in a process of its own: it does not stop or die with rank 0.

Started by :func:`dtrain.world.serve_apart`, by path, so that no more than torch is imported:

    python store_process.py PORT TIMEOUT_S

It writes a line to stdout once it serves, or why it cannot, and lives as long as the process
that started it. If that ends without a word, the other ranks have some seconds yet to read in
the store what became of it.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from datetime import timedelta

#: How long the store outlives a parent that did not end it.
LINGER_S = 15.0
_LOOK_S = 1.0


def serve(port: int, timeout_s: float) -> int:
    """Serves the store at ``port`` until the parent ends; returns an exit code.

    Ranks: none; a process beside rank 0.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    parent = os.getppid()
    # What is meant for the ranks (a time limit, Ctrl-C) must not take their store away first.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    try:
        store = TCPStore(
            "localhost",  # where it connects to itself; it serves at all addresses
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        _say(f"cannot serve at port {port}: {error}".replace("\n", " "))
        return 1
    _say("serving")
    ended = _wait_for(parent)
    if not ended:
        threading.Event().wait(LINGER_S)
    del store
    os._exit(0)  # torch takes its time to tidy up, and rank 0 waits for it


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    # Whoever waits for the end of the job's output must not wait for this process.
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(nothing, stream)


def _wait_for(parent: int) -> bool:
    """Returns once the parent is gone: whether it said so."""
    while os.getppid() == parent:
        # Children of the parent may hold the other end, so its closing is not enough.
        if select.select([0], [], [], _LOOK_S)[0]:
            return bool(os.read(0, 1))
    return False


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1]), float(sys.argv[2])))
