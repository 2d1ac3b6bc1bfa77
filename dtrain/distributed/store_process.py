"""A rendezvous store in a process of its own: it does not stop or die with rank 0.

Started by :mod:`dtrain.distributed.rendezvous`, by path, so that no more than torch is imported:

    python store_process.py ABOUT TIMEOUT_S PATIENCE_S PORT ...

It serves at the first of the ports that is free, and says in the store what it serves (ABOUT). It
writes a line to stdout once it serves, or why it cannot. On stdin it is told the process numbers
of the ranks of this host, whether there are ranks elsewhere, and in the end that it may go. If its
parent ends without that word, the other ranks have some seconds yet to read in the store what
became of it; it does not outlive the last of them.
"""

import errno
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

END, ELSEWHERE = "end", "elsewhere"  # what it is told besides process numbers
SERVED = "dtrain/served"  # a key that only such a store has
SERVING = "serving at "
_LINGER_S = 15.0  # how long it outlives a parent that did not end it, at most
_LOOK_S = 0.25


def serve(about: str, timeout_s: float, patience_s: float, ports: Sequence[int]) -> int:
    """Serves the store until the parent ends; returns an exit code."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    parent = os.getppid()
    # Each rank has up to three connections to it.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):  # then it serves as many as it may
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # What is meant for the ranks (a time limit, Ctrl-C) must not take their store away first.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    timeout = timedelta(seconds=timeout_s)
    try:
        listening = _listen(ports, patience_s, parent)
        port = listening.getsockname()[1]
        # Given a socket, torch neither warns of a taken port nor, told that others serve, takes
        # it for theirs. It serves at all addresses, and connects to itself at localhost.
        store = TCPStore(
            "localhost",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=listening.fileno(),
        )
    except (OSError, RuntimeError) as error:
        _say(f"{getattr(error, 'strerror', None) or error}".replace("\n", " "))
        return 1
    store.set(SERVED, about)
    _say(f"{SERVING}{port}")
    _linger(_wait_for(parent))
    del store
    os._exit(0)  # torch takes its time to tidy up, and rank 0 waits for it


def _listen(ports: Sequence[int], patience_s: float, parent: int) -> socket.socket:
    """Listens at the first port that is free; of a job that has just ended it may not be yet."""
    until = time.monotonic() + patience_s
    while True:
        for port in ports:
            try:
                return _listen_at(port)
            except OSError as error:
                last = error
        if time.monotonic() > until or os.getppid() != parent:
            raise last
        threading.Event().wait(_LOOK_S)


def _listen_at(port: int) -> socket.socket:
    backlog = 4096  # many ranks come at once
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
            )
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port), backlog=backlog)  # no address of IPv6 here


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    # Whoever waits for the end of the job's output must not wait for this process.
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(nothing, stream)


def _wait_for(parent: int) -> list[str]:
    """Returns what the parent said, once it is gone or has said that this is the end."""
    said, listening = b"", [0]
    # Children of the parent may hold the other end of stdin, so that its closing is not enough.
    while os.getppid() == parent and END not in said.decode().split():
        if select.select(listening, [], [], _LOOK_S)[0]:
            more = os.read(0, 1 << 16)
            said += more
            if not more:
                listening = []
    return said.decode().split()


def _linger(told: list[str]) -> None:
    """Waits until no rank is left that could ask, or for long enough, unless told to end."""
    until = time.monotonic() + _LINGER_S
    here = [int(pid) for pid in told if pid.isdigit()]
    never = threading.Event()
    while (
        END not in told
        and time.monotonic() < until
        and (ELSEWHERE in told or any(map(_lives, here)))
    ):
        never.wait(_LOOK_S)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False  # gone; its number may be that of another's process by now
    return True


if __name__ == "__main__":
    sys.exit(
        serve(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), list(map(int, sys.argv[4:])))
    )
