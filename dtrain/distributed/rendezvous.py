"""The rendezvous store: where ranks find one another, and leave what became of them."""

from __future__ import annotations

import atexit
import os
import resource
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dtrain.distributed.heartbeat import Heartbeat
from dtrain.distributed.processes import this_machine
from dtrain.distributed.store_process import ELSEWHERE, END
from dtrain.errors import LaunchError

_SERVED_ELSEWHERE = "TORCHELASTIC_USE_AGENT_STORE"  # tells torch that rank 0 is not to serve it


def _allow_files(size: int) -> None:
    """Raises how many files this process may have open, as far as it may itself.

    Each gloo group is a connection to every other rank, and there are up to three; the limit that
    most systems begin with, 1024, would end that at some 340 ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * size + 1024
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # it may be enough as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve_store(timeout_s: float) -> TCPStore:
    """Serves a rendezvous store at a free port of this host, for ranks that are started here.

    Ranks: none; called where the ranks are started.
    """
    timeout = timedelta(seconds=timeout_s)
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)


def _serve_apart(timeout_s: float) -> subprocess.Popen[str] | None:
    """Has the rendezvous store served by a process of its own, where rank 0 would serve it.

    Were rank 0 stopped or killed, the others could not read any more what became of it.

    Returns:
        The process, where this rank started one.
    """
    if dist.is_initialized() or os.environ.get(_SERVED_ELSEWHERE) == "True":
        return None
    os.environ[_SERVED_ELSEWHERE] = "True"
    if os.environ["RANK"] != "0":
        return None
    script = Path(__file__).with_name("store_process.py")
    process = subprocess.Popen(
        [sys.executable, str(script), os.environ["MASTER_PORT"], str(timeout_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_end_store, process)
    return process


def _await_store(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    with process.stdout as told:
        answer = told.readline().strip()
    if answer != "serving":
        raise LaunchError(
            f"the rendezvous store {answer or 'ended before it served'}. Is another job on this "
            "host at that port? Set MASTER_PORT to a free one."
        )


def _tell_store(process: subprocess.Popen[str], ranks: list[Heartbeat]) -> None:
    """Says whom the store serves: it must not outlive the job."""
    assert process.stdin is not None
    here = [str(one.pid) for one in ranks if one.machine and one.machine == this_machine()]
    words = here if len(here) == len(ranks) else [*here, ELSEWHERE]
    process.stdin.write(" ".join(words) + "\n")
    process.stdin.flush()


def _end_store(process: subprocess.Popen[str]) -> None:
    """At the end of rank 0; after an error the others may still read there what it was."""
    if not _is_failing() and process.stdin is not None:
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            process.communicate(END, timeout=5)


def _is_failing() -> bool:
    """The interpreter ends with an uncaught error."""
    return getattr(sys, "last_exc", None) is not None or (
        getattr(sys, "last_value", None) is not None
    )


def _own_store(timeout: timedelta, life: int) -> Store:
    """A connection of its own to the rendezvous store, apart from the process group's.

    Keys are kept apart by restart attempt: the launcher's store outlives an attempt.
    """
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timeout,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"dtrain/{attempt}/{life}", store)
