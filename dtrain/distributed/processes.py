"""The ranks' processes: what they post of themselves, what the kernel says, and how they end.

Ranks: all, local.
"""

import atexit
import json
import os
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Process = Literal["runs", "stopped", "gone", "unknown"]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What one rank posts of itself in the rendezvous store, for the others to read."""

    rank: int
    host: str
    pid: int
    machine: str  # equal where process numbers mean the same; nothing where that is not known
    number: int  # grows from post to post
    step: int = 0  # the global step it is in
    phase: str = ""  # where its main thread is: a hook, or a phase of the loop
    at: str = ""  # ``file:line`` of that, once it has stayed there for a moment
    waits: bool = False  # for other ranks
    quiet_s: float = 0.0  # for how long it has made no progress
    limit_s: float = 0.0  # how long that may be where it is
    inside: bool = False  # in ``fit`` or ``evaluate``; elsewhere nobody posts

    def to_json(self) -> str:
        """Returns what :meth:`from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Heartbeat":
        """Reads what :meth:`to_json` returned."""
        return cls(**json.loads(text))

    @property
    def who(self) -> str:
        """Rank, host and process, in words."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    @property
    def where(self) -> str:
        """Step, phase and line, in words."""
        if not self.inside:
            return "outside of fit"
        return f"step {self.step} in {self.phase}" + (f" ({self.at})" if self.at else "")


def heartbeat_key(rank: int) -> str:
    """Where in the store a rank posts."""
    return f"heartbeat/{rank}"


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
    """Returns which processes that this one has started are stopped, as loaders' workers may be.

    Their own children are among them: workers may come from a server that forks.
    """
    of = of or os.getpid()
    try:
        children = Path(f"/proc/{of}/task/{of}/children").read_text().split()
    except OSError:
        return []  # the kernel does not tell
    stopped = []
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
