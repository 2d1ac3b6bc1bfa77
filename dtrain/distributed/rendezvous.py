"""The rendezvous store: where ranks find one another, and leave what became of them."""

import atexit
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dtrain.distributed.activity import Heartbeat
from dtrain.distributed.processes import is_failing, this_machine
from dtrain.distributed.store_process import ELSEWHERE, END
from dtrain.errors import LaunchError

_SERVED_ELSEWHERE = "TORCHELASTIC_USE_AGENT_STORE"  # tells torch that rank 0 is not to serve it


def serve_store(timeout_s: float) -> TCPStore:
    """Serves a rendezvous store at a free port of this host, for ranks that are started here."""
    timeout = timedelta(seconds=timeout_s)
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)


def local_store() -> Store:
    """Returns a rendezvous store that lives in this process only, for ranks that are threads."""
    return HashStore()


def own_store(timeout: timedelta, life: int) -> Store:
    """Returns a connection of its own to the rendezvous store, apart from the process group's."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the launcher's store outlives it
    return PrefixStore(f"dtrain/{attempt}/{life}", store)


def serve_apart(timeout_s: float) -> "StoreProcess | None":
    """Has the store served by a process, where rank 0 would; returns it on the rank that did."""
    if dist.is_initialized() or os.environ.get(_SERVED_ELSEWHERE) == "True":
        return None
    os.environ[_SERVED_ELSEWHERE] = "True"
    return StoreProcess(timeout_s) if os.environ["RANK"] == "0" else None


class StoreProcess:
    """The store beside rank 0: if that one is killed, the others can read what became of it."""

    def __init__(self, timeout_s: float) -> None:
        script = Path(__file__).with_name("store_process.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), os.environ["MASTER_PORT"], str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._end)

    def wait(self) -> None:
        """Returns once it serves; raises LaunchError where it cannot."""
        assert self._process.stdout is not None
        with self._process.stdout as told:
            answer = told.readline().strip()
        if answer != "serving":
            raise LaunchError(
                f"the rendezvous store {answer or 'ended before it served'}. Is another job on "
                "this host at that port? Set MASTER_PORT to a free one."
            )

    def tell(self, ranks: Sequence[Heartbeat]) -> None:
        """Says whom it serves: it must not outlive the job."""
        assert self._process.stdin is not None
        here = [str(one.pid) for one in ranks if one.machine and one.machine == this_machine()]
        told = here if len(here) == len(ranks) else [*here, ELSEWHERE]
        self._process.stdin.write(" ".join(told) + "\n")
        self._process.stdin.flush()

    def _end(self) -> None:
        # After an error the others may still read there what it was.
        if not is_failing():
            with suppress(BrokenPipeError, subprocess.TimeoutExpired):
                self._process.communicate(END, timeout=5)
