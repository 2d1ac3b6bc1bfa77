"""What the kernel says of the ranks' processes, and how this one ends."""

import atexit
import os
import sys
import threading
from pathlib import Path
from typing import Literal

from dtrain.distributed.activity import Heartbeat

Process = Literal["runs", "stopped", "gone", "unknown"]


def this_machine() -> str:
    """Names the space of process numbers that this process is in; nothing where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def look_up(heartbeat: Heartbeat, machine: str) -> Process:
    """Asks the kernel about a rank's process, if it runs on this ``machine``."""
    return _state_of(heartbeat.pid) if machine and heartbeat.machine == machine else "unknown"


def stopped_children(of: int | None = None) -> list[int]:
    """Returns which processes that this one has started are stopped, as loaders' workers may be."""
    of = of or os.getpid()
    try:
        children = Path(f"/proc/{of}/task/{of}/children").read_text().split()
    except OSError:
        return []  # the kernel does not tell
    stopped = []  # with their own children: workers may come from a server that forks
    for pid in map(int, children):
        stopped += [pid] * (_state_of(pid) == "stopped") + stopped_children(pid)
    return stopped


def _state_of(pid: int) -> Process:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return "gone"
    except OSError:
        return "unknown"
    state = stat[stat.rindex(")") + 2]
    if state in "ZXx":
        return "gone"
    return "stopped" if state == "T" else "runs"  # "t": in a debugger; that is no fault


def end_with(what: str, *threads: threading.Thread, timeout_s: float) -> None:
    """Has the interpreter wait for ``threads``, which do ``what``, in turn before it ends.

    A thread that is stuck is waited for ``timeout_s``; the process then ends with code 1.
    """

    # While the interpreter ends, it takes itself away from threads that ask for its lock. One that
    # does so as it comes back from torch's code (a collective, a call of the rendezvous store)
    # aborts the process: "terminate called without an active exception".
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
    return getattr(sys, "last_value", None) is not None
