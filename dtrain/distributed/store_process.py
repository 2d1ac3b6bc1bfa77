"""A rendezvous store in a process of its own: it does not stop or die with rank 0.

Started by :mod:`dtrain.distributed.rendezvous`, by path, so that no more than torch is imported:

    python store_process.py ABOUT VERDICT TIMEOUT_S PATIENCE_S PORT ...

It serves at the first of the ports that is free, and says in the store whom it serves (ABOUT). In
another job's it leaves an error (at VERDICT) if ranks still gather there and may be of either. It
writes a line to stdout once it serves, or why it cannot. On stdin it is told the process numbers of
the ranks of this host, whether there are ranks elsewhere, and in the end that it may go. If its
parent ends without that word, the other ranks have some seconds yet to read in the store what
became of it; it does not outlive the last of them.
"""

import errno
import json
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
_ANSWER_S = 5.0  # whoever takes a call at the port and says nothing for so long is no store


def serve(
    about: str, verdict: str, timeout_s: float, patience_s: float, ports: Sequence[int]
) -> int:
    """Serves the store until the parent ends; returns an exit code."""
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
        listening = _listen(ports, about, verdict, patience_s)
        port = listening.getsockname()[1]
        # Late: of two jobs that start at one port, the second is to know that soon.
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

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
        number = getattr(error, "errno", None)
        _say(os.strerror(number) if number else f"{error}".replace("\n", " "))
        return 1
    store.set(SERVED, about)
    _say(f"{SERVING}{port}")
    _linger(_wait_for(parent))
    del store
    os._exit(0)  # torch takes its time to tidy up, and rank 0 waits for it


def _listen(ports: Sequence[int], about: str, verdict: str, patience_s: float) -> socket.socket:
    """Listens at the first port that is free."""
    until = time.monotonic() + patience_s
    while True:
        for port in ports:
            try:
                return _listen_at(port)
            except OSError as error:
                last = error
        if last.errno != errno.EADDRINUSE or len(ports) > 1 or time.monotonic() > until:
            raise last
        # In a thread: it may be anything that has the port, and never answer.
        answers: list[bool] = []
        visit = threading.Thread(target=_visit, args=(port, about, verdict, answers), daemon=True)
        visit.start()
        visit.join(_ANSWER_S)
        if answers != [True]:
            raise last
        threading.Event().wait(_LOOK_S)


def _visit(port: int, about: str, verdict: str, answers: list[bool]) -> None:
    """Looks whose store has the port: ``answers`` whether it is left over, and about to end.

    A job that none but its rank 0 tells from this one, and whose ranks still gather, is told: they
    may be of either.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = timedelta(seconds=_ANSWER_S)
    with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):
        # torch would try for long, with many lines, where nobody listens any more.
        socket.create_connection(("localhost", port), timeout=_ANSWER_S).close()
        store = TCPStore(
            "localhost", port, is_master=False, wait_for_workers=False, timeout=timeout
        )
        theirs, mine = json.loads(store.get(SERVED)), json.loads(about)
        if theirs["host"] == mine["host"] and not _lives(theirs["pid"]):
            answers.append(True)
        elif all(theirs[name] == mine[name] for name in ("identity", "ranks")):
            both = " and ".join(f"process {one['pid']} on {one['host']}" for one in (theirs, mine))
            why = (
                f"two jobs of {mine['ranks']} ranks start at the same port {port}, or RANK=0 was "
                f"given twice: {both} are both rank 0. Set MASTER_PORT to a free port, another for "
                "each job."
            )
            store.compare_set(verdict, "", json.dumps({"error": why}))


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
    _, about, verdict, timeout_s, patience_s, *ports = sys.argv
    sys.exit(serve(about, verdict, float(timeout_s), float(patience_s), list(map(int, ports))))
