"""What the kernel says of the ranks' processes, and how this one ends."""

import atexit
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Literal

from dtrain.distributed.activity import Heartbeat

#: "away": its host does not answer.
Process = Literal["runs", "stopped", "gone", "away", "unknown"]

_STACKS_S = 1.0  # how long a process that is aborted may write its stacks


def this_machine() -> str:
    """Names the space of process numbers that this process is in; nothing where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def look_up(heartbeat: Heartbeat, machine: str) -> Process:
    """Asks the kernel about a rank's process, if it runs on this ``machine``."""
    if not machine or heartbeat.machine != machine:
        return "unknown"
    state, started = _look_at(heartbeat.pid)
    return state if heartbeat.started in (0, started) else "gone"  # its number is another's


def started(pid: int) -> int:
    """Returns when a process was started, as the kernel counts it; 0 where unknown."""
    return _look_at(pid)[1]


def end_process(heartbeat: Heartbeat, machine: str, *, held: bool = False) -> None:
    """Ends a rank's process on this ``machine`` that is stopped, or whose interpreter is ``held``.

    That one first writes its stacks, which faulthandler does without the interpreter.
    """
    if not (heartbeat.started and machine == heartbeat.machine):
        return
    with suppress(OSError):
        handle = os.pidfd_open(heartbeat.pid)
        try:
            state = look_up(heartbeat, machine)  # whose handle it is: it lives, so its number is
            if state == "runs" and held:
                signal.pidfd_send_signal(handle, signal.SIGABRT)
                select.select([handle], [], [], _STACKS_S)
            if state == "stopped" or held:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def stopped_children(of: int | None = None) -> list[int]:
    """Returns which processes that this one has started are stopped, as loaders' workers may be."""
    of = of or os.getpid()
    try:
        children = Path(f"/proc/{of}/task/{of}/children").read_text().split()
    except OSError:
        return []  # the kernel does not tell
    stopped = []  # with their own children: workers may come from a server that forks
    for pid in map(int, children):
        stopped += [pid] * (_look_at(pid)[0] == "stopped") + stopped_children(pid)
    return stopped


def _look_at(pid: int) -> tuple[Process, int]:
    """Returns what a process does, and when it was started."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "gone", 0
    except OSError:
        return "unknown", 0
    fields = stat[stat.rindex(")") + 2 :].split()
    state, began = fields[0], int(fields[19])
    if state in "ZXx":
        return "gone", began
    return ("stopped" if state == "T" else "runs"), began  # "t": in a debugger; that is no fault


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
