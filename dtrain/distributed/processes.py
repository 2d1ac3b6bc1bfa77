"""What the kernel says of the processes of this machine.

Ranks: all, local.
"""

import os
from pathlib import Path
from typing import Literal

from dtrain.distributed.heartbeat import Heartbeat

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
    if not machine or heartbeat.machine != machine:
        return "unknown"
    return _process(heartbeat.pid)


def stopped_children(of: int | None = None) -> list[int]:
    """Returns which processes that this one has started are stopped, as loaders' workers may be.

    Their own children are among them: workers may come from a server that forks. Empty where the
    kernel does not tell.
    """
    of = of or os.getpid()
    try:
        children = Path(f"/proc/{of}/task/{of}/children").read_text().split()
    except OSError:
        return []
    stopped = []
    for pid in map(int, children):
        stopped += [pid] * (_process(pid) == "stopped") + stopped_children(pid)
    return stopped


def _process(pid: int) -> Process:
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
