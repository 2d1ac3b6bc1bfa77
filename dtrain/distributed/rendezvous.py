"""The rendezvous store: where ranks find one another, and leave what became of them."""

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dtrain.distributed.activity import Heartbeat
from dtrain.distributed.processes import is_failing, this_machine
from dtrain.distributed.store_process import ELSEWHERE, END, SERVED
from dtrain.errors import LaunchError

_SERVED_ELSEWHERE = "TORCHELASTIC_USE_AGENT_STORE"  # tells torch that rank 0 is not to serve it
_ANSWER_S = 5.0  # whoever takes a call at the port and says nothing for so long is no store
_LOOK_S = 0.2
_TAKEN = "Is another job at that port? Set MASTER_PORT to a free one, the same on all ranks."


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
    """Has the store served by a process, where rank 0 would; None where a launcher serves it."""
    if dist.is_initialized() or os.environ.get(_SERVED_ELSEWHERE) == "True":
        return None
    os.environ[_SERVED_ELSEWHERE] = "True"
    return StoreProcess(timeout_s)


class StoreProcess:
    """The store beside rank 0: if that one is killed, the others can read what became of it.

    On other ranks than 0, it is somewhere else.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None
        if os.environ["RANK"] != "0":
            return
        script = Path(__file__).with_name("store_process.py")
        # Told that others serve it, torch would take a port that is taken for theirs.
        env = {name: v for name, v in os.environ.items() if name != _SERVED_ELSEWHERE}
        self._process = subprocess.Popen(
            [sys.executable, str(script), os.environ["MASTER_PORT"], str(timeout_s)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._end)

    def wait(self) -> None:
        """Returns once it serves this rank; raises LaunchError where it cannot."""
        try:
            if self._process is not None:
                assert self._process.stdout is not None
                with self._process.stdout as told:
                    answer = told.readline().strip()
                if answer != "serving":
                    raise LaunchError(
                        f"the rendezvous store {answer or 'ended before it served'}. {_TAKEN}"
                    )
            _come_in(self._timeout_s)
        except LaunchError:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
                self._process = None
            del os.environ[_SERVED_ELSEWHERE]  # as it was: the script may try another port
            raise

    def tell(self, ranks: Sequence[Heartbeat]) -> None:
        """Says whom it serves: it must not outlive the job. Ranks: rank 0 only."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        here = [str(one.pid) for one in ranks if one.machine and one.machine == this_machine()]
        told = here if len(here) == len(ranks) else [*here, ELSEWHERE]
        self._process.stdin.write(" ".join(told) + "\n")
        self._process.stdin.flush()

    def _end(self) -> None:
        # After an error the others may still read there what it was.
        if self._process is not None and not is_failing():
            with suppress(BrokenPipeError, subprocess.TimeoutExpired):
                self._process.communicate(END, timeout=5)


def _come_in(timeout_s: float) -> None:
    """Returns once this job's store answers, and has this rank for the first time.

    A LaunchError says that somebody else has the port: no store, another job's, or torch's own.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    answer_s = min(timeout_s, _ANSWER_S + int(size) / 100)  # of many ranks at once, it takes longer
    deadline = time.monotonic() + timeout_s
    mine = f"rank {rank} is process {os.getpid()} on {socket.gethostname()}"
    answers: list[str] = []

    def ask() -> None:
        with suppress(RuntimeError):  # it does not listen yet, or is no store
            timeout = timedelta(seconds=answer_s)
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
            store.wait([SERVED], timeout)
            sizes = store.compare_set("dtrain/size", "", size).decode()
            came = store.compare_set(f"dtrain/came/{rank}", "", mine).decode()
            same = sizes == size and came == mine
            answers.append("" if same else f"another job of dtrain's ({sizes} ranks; {came})")

    while not _listens(host, port):
        if time.monotonic() > deadline:
            raise LaunchError(
                f"nobody has served the rendezvous store at {host}:{port} in {timeout_s:g} s: rank "
                "0 has not started, has failed, or is at another address"
            )
        threading.Event().wait(_LOOK_S)
    for _ in range(2):  # it may just be beginning
        # In a thread: a client waits beyond its time-out for who takes its call and says nothing.
        asking = threading.Thread(target=ask, name="dtrain rendezvous", daemon=True)
        asking.start()
        asking.join(answer_s + 1)
        if answers:
            break
    who = answers[0] if answers else "something that is not this job's rendezvous store"
    if who:
        raise LaunchError(f"rank {rank} has met {who} at {host}:{port}. {_TAKEN}")


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True
