"""The rendezvous store: where ranks find one another, and leave what became of them."""

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from select import select

import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dtrain.distributed.activity import Heartbeat
from dtrain.distributed.addresses import addresses_of, is_loopback
from dtrain.distributed.processes import is_failing, this_machine
from dtrain.distributed.store_process import ELSEWHERE, END, SERVED, SERVING
from dtrain.errors import LaunchError

_SERVED_ELSEWHERE = "TORCHELASTIC_USE_AGENT_STORE"  # tells torch that rank 0 is not to serve it
_ANSWER_S = 5.0  # whoever takes a call at the port and says nothing for so long is no store
_PATIENCE_S = 5.0  # a job that had the port before may just be ending
_MUTE_S = 20.0  # rank 0's store listens, then imports torch, which a busy host may take long for
_LOOK_S = 0.2
_LOOK_UP_AGAIN_S = 2.0
_SAY_S = 10.0  # who waits for so long says for whom; then after twice as long, and so on
KEYS_AT_ONCE = 256  # that are asked for in one call of the store
_PORTS = 8  # where nobody chose one: so many, one after the other, may be taken
MET = "met"  # a key: what became of the meeting of all ranks; see meeting.py
_TAKEN = "Set MASTER_PORT to a free port, the same on all ranks, or wait for the end of that job."
#: What tells one start of a launcher's from any other.
_LAUNCHERS_JOBS = (
    "PMIX_NAMESPACE",
    "OMPI_MCA_ess_base_jobid",
    "I_MPI_HYDRA_UUID",
    "PALS_APID",
)


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
    return PrefixStore(_prefix(life), _connect(host, port, timeout))


def scripts_store(timeout: timedelta, life: int) -> Store:
    """Does the same by way of the store of the group that the script has opened, of any kind.

    A file, and what the script has made itself, has no connection: there it is the same store.
    """
    store = dist.distributed_c10d._get_default_store()
    try:
        apart = store.clone()  # type: ignore[attr-defined]
    except (RuntimeError, AttributeError, NotImplementedError):  # one made in Python
        return PrefixStore(f"dtrain/{life}", store)
    apart.set_timeout(timeout)
    return PrefixStore(f"dtrain/{life}", apart)


def _prefix(life: int) -> str:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the launcher's store outlives it
    return f"dtrain/{attempt}/{life}"


def _connect(host: str, port: int, timeout: timedelta) -> TCPStore:
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def read_all(store: Store, keys: list[str]) -> list[bytes]:
    """Returns what is at keys that are there, in calls of so many as cost the store least."""
    # Of 256 it takes 0.7 us each, of 10,000 in one call 10 us each.
    told: list[bytes] = []
    for first in range(0, len(keys), KEYS_AT_ONCE):
        told += store.multi_get(keys[first : first + KEYS_AT_ONCE])
    return told


class Patience:
    """A wait that is told of now and then, and has an end."""

    def __init__(self, timeout_s: float, rank: int) -> None:
        self._began, self._rank = time.monotonic(), rank
        self._say_s = _SAY_S
        self._timeout_s = timeout_s

    @property
    def so_far_s(self) -> float:
        """How long it has taken."""
        return time.monotonic() - self._began

    @property
    def is_over(self) -> bool:
        """It has taken as long as it may."""
        return self.so_far_s > self._timeout_s

    def say(self, words: Callable[[], str]) -> None:
        """Says what is waited for, when it is time to."""
        if self.so_far_s > self._say_s:
            self._say_s *= 2
            if told := words():
                left_s = max(0.0, self._timeout_s - self.so_far_s)
                sys.stderr.write(
                    f"dtrain: rank {self._rank} on {socket.gethostname()}: {told} "
                    f"(for {self.so_far_s:.0f} s; in another {left_s:.0f} s it is an error)\n"
                )
                sys.stderr.flush()

    def wait(self, ranks: int) -> None:
        """Waits before the next look: of many ranks each looks more rarely."""
        pause_s = min(_LOOK_S, self.so_far_s / 10 + 0.005) + ranks / 5000
        select([], [], [], pause_s)  # a lock's time-out is that of a clock that may be shifted


@dataclass(frozen=True)
class Job:
    """What a store says of the job that it serves.

    Attributes:
        identity: what the launcher calls this start; nothing where it has no name for it.
    """

    identity: str
    ranks: int
    host: str
    pid: int
    slurm: str

    @classmethod
    def of(cls, env: Mapping[str, str], launcher: str, *, by_launcher: bool) -> "Job":
        """Describes this job; ``by_launcher``: this rank's place follows from its variables."""
        job, step = env.get("SLURM_JOB_ID", ""), env.get("SLURM_STEP_ID", "")
        slurm = f"SLURM job {job}" * bool(job) + f", step {step}" * bool(job and step)
        identity = ""
        if launcher == "slurm":
            first = env.get("SLURM_HET_JOB_ID") or job
            identity = f"slurm {first}.{step}.{env.get('SLURM_RESTART_COUNT') or 0}"
        elif by_launcher:
            found = [f"{name}={env[name]}" for name in _LAUNCHERS_JOBS if env.get(name)]
            identity = found[0] if found else ""
        elif env.get("TORCHELASTIC_RUN_ID", "none") != "none":
            identity = f"torchrun {env['TORCHELASTIC_RUN_ID']}"
        return cls(identity, int(env["WORLD_SIZE"]), socket.gethostname(), os.getpid(), slurm)

    def is_same(self, other: "Job") -> bool:
        """They may be one job: where no launcher has named it, that cannot be known."""
        return (self.identity, self.ranks) == (other.identity, other.ranks)

    def __str__(self) -> str:
        return (
            f"another dtrain job ({self.ranks} ranks, of which rank 0 is process {self.pid} on "
            f"{self.host}{', ' * bool(self.slurm)}{self.slurm})"
        )


def find_address(timeout_s: float) -> None:
    """Sees to it that MASTER_ADDR resolves; raises LaunchError where it does not."""
    host, size = os.environ["MASTER_ADDR"], os.environ["WORLD_SIZE"]
    found, why = addresses_of(host)
    if found:
        return
    if os.environ.get("LOCAL_WORLD_SIZE") == size:
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # all ranks are here: nobody else has to find it
        return
    rank = int(os.environ["RANK"])
    patience = Patience(timeout_s, rank)
    words = (
        f"rank {rank} on {socket.gethostname()} cannot find rank 0: "
        f"MASTER_ADDR={host} does not resolve ({why})"
    )
    if "KUBERNETES_SERVICE_HOST" in os.environ:  # a pod's name is known once that has started
        sys.stderr.write(f"dtrain: {words}; it is looked up again until it does\n")
        while not found and not patience.is_over:
            threading.Event().wait(_LOOK_UP_AGAIN_S)
            found, why = addresses_of(host)
    if not found:
        raise LaunchError(
            f"{words}. Set MASTER_ADDR to an address of rank 0's host that the others can reach "
            f"(there: `hostname -i`; with torchrun: --local-addr=ADDRESS), or add `ADDRESS {host}` "
            "to /etc/hosts on every host."
        )


def serve_apart(job: Job, ports: Sequence[int], timeout_s: float) -> "StoreProcess | None":
    """Has the store served by a process, where rank 0 would; None where a launcher serves it."""
    if os.environ.get(_SERVED_ELSEWHERE) == "True":
        return None
    os.environ[_SERVED_ELSEWHERE] = "True"
    return StoreProcess(job, ports, timeout_s)


def ports_for(port: int, job: Job, *, chosen: bool) -> list[int]:
    """Returns at which ports rank 0 may serve: one that was chosen; else it, or one of the next.

    The others know whose store they have met only where the launcher has named the job.
    """
    return list(range(port, port + (1 if chosen or not job.identity else _PORTS)))


class StoreProcess:
    """The store beside rank 0: if that one is killed, the others can read what became of it.

    On other ranks than 0, it is somewhere else.
    """

    def __init__(self, job: Job, ports: Sequence[int], timeout_s: float) -> None:
        self._job, self._ports, self._timeout_s = job, ports, timeout_s
        self._process: subprocess.Popen[str] | None = None
        if os.environ["RANK"] != "0":
            return
        script = Path(__file__).with_name("store_process.py")
        about = json.dumps(asdict(job)), f"{_prefix(0)}/{MET}", f"{timeout_s}", f"{_PATIENCE_S}"
        self._process = subprocess.Popen(
            [sys.executable, str(script), *about, *map(str, ports)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._end)

    def wait(self) -> None:
        """Returns once it serves this rank, at ``MASTER_PORT``; raises LaunchError if it cannot."""
        if self._process is not None:
            assert self._process.stdout is not None
            with self._process.stdout as told:
                answer = told.readline().strip()
            if not answer.startswith(SERVING):
                raise self._taken(answer)
            port = int(answer.removeprefix(SERVING))
            _check_own(port, self._timeout_s)
        else:
            port = find_store(self._job, self._ports, self._timeout_s)
        os.environ["MASTER_PORT"] = str(port)

    def drop(self) -> None:
        """Ends it, and leaves the environment as it was: the script may try another port."""
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None
        os.environ.pop(_SERVED_ELSEWHERE, None)

    def tell(self, ranks: Sequence[Heartbeat]) -> None:
        """Says whom it serves: it must not outlive the job. Ranks: rank 0 only."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        here = [str(one.pid) for one in ranks if one.machine and one.machine == this_machine()]
        told = here if len(here) == len(ranks) else [*here, ELSEWHERE]
        self._process.stdin.write(" ".join(told) + "\n")
        self._process.stdin.flush()

    def _taken(self, why: str) -> LaunchError:
        """Says who has the port, and why that is an error. Ranks: rank 0 only."""
        port = self._ports[0]
        there = _ask("localhost", port, _ANSWER_S) if _listens("localhost", port) else None
        at = f"at port {port}" if len(self._ports) == 1 else f"at ports {port} to {self._ports[-1]}"
        words = f"rank 0 on {socket.gethostname()} cannot serve the rendezvous store {at}: "
        if there is None:
            return LaunchError(f"{words}{why or 'its process died'}{_listener(port)}. {_TAKEN}")
        if not there.is_same(self._job):
            return LaunchError(f"{words}{there} has it. {_TAKEN}")
        if there.identity:
            words += f"process {there.pid} on {there.host} is rank 0 of this same job. RANK=0 was "
            return LaunchError(f"{words}given to two processes: each must have its own.")
        return LaunchError(f"{words}{there} has it, or RANK=0 was given twice. {_TAKEN}")

    def _end(self) -> None:
        # After an error the others may still read there what it was.
        if self._process is not None and not is_failing():
            with suppress(BrokenPipeError, subprocess.TimeoutExpired):
                self._process.communicate(END, timeout=5)


def _check_own(port: int, timeout_s: float) -> None:
    """Raises where MASTER_ADDR does not lead to what rank 0 serves. Ranks: rank 0 only."""
    host = os.environ["MASTER_ADDR"]
    there = _ask(host, port, min(timeout_s, _ANSWER_S)) if _listens(host, port) else None
    if there is None or there.pid != os.getpid():
        raise LaunchError(
            f"rank 0 runs on {socket.gethostname()}, and serves the rendezvous store there, at "
            f"port {port}; at {host}:{port}, where the others look for it, is {there or 'none'}. "
            "Set MASTER_ADDR to a name or an address of rank 0's host."
        )


def refuse(store: Store, why: str) -> str:
    """Has the meeting of all ranks end with an error, unless it has ended; returns its end."""
    return store.compare_set(MET, "", json.dumps({"error": why})).decode()


def find_store(job: Job | None, ports: Sequence[int], timeout_s: float) -> int:
    """Returns the port at which this job's store answers; any store will do if ``job`` is None.

    A LaunchError says that others have the ports, or that nobody has come.
    """
    host, size = os.environ["MASTER_ADDR"], int(os.environ["WORLD_SIZE"])
    rank = int(os.environ["RANK"])
    patience, strangers, mute = Patience(timeout_s, rank), dict[int, str](), set[int]()
    answer_s = min(timeout_s, _ANSWER_S + size / 100)  # of many ranks at once, it takes longer
    asked = -_ANSWER_S
    at = f"{host}:{ports[0]}" + f" to {ports[-1]}" * (len(ports) > 1)
    # A rank of each host says it; in a small world, all.
    tells = rank <= 16 or os.environ.get("LOCAL_RANK") == "0"
    while not patience.is_over:
        again = patience.so_far_s - asked > 1  # strangers are not asked all the time
        for port in ports:
            if port in strangers and not again:
                continue
            strangers.pop(port, None)
            if not _listens(host, port):
                continue
            there = None if job is None else _ask(host, port, answer_s)
            if job is None or (there is not None and there.is_same(job)):
                return port
            strangers[port] = str(there or "something that is not this job's rendezvous store")
            (mute.discard if there else mute.add)(port)
        asked = patience.so_far_s if again else asked
        if len(strangers) == len(ports) and patience.so_far_s > (_MUTE_S if mute else _PATIENCE_S):
            raise LaunchError(f"rank {rank} has met {strangers[ports[0]]} at {at}. {_TAKEN}")
        patience.say(lambda: f"nobody serves the rendezvous store at {at} yet" if tells else "")
        patience.wait(size)
    found, _ = addresses_of(host)
    elsewhere = os.environ.get("LOCAL_WORLD_SIZE") != str(size) and any(map(is_loopback, found))
    here = f"; {host} is, on each host, that host itself" if elsewhere and rank else ""
    met = f"; at port {min(strangers)} is {strangers[min(strangers)]}" if strangers else ""
    raise LaunchError(
        f"nobody has served the rendezvous store at {at} in {timeout_s:g} s: rank 0 has not "
        f"started, has failed, or is at another address{here}{met}"
    )


def _ask(host: str, port: int, answer_s: float) -> Job | None:
    """Returns whose store is there; None where it is none of dtrain's, or does not answer."""
    answers: list[Job] = []

    def ask() -> None:
        with suppress(RuntimeError, ValueError, TypeError):  # it is no store, or another version's
            timeout = timedelta(seconds=answer_s)
            store, patience = _connect(host, port, timeout), Patience(answer_s, -1)
            while not store.check([SERVED]) and not patience.is_over:  # it may just be beginning
                patience.wait(1)
            answers.append(Job(**json.loads(store.get(SERVED))))

    # In a thread: a client waits beyond its time-out for who takes its call and says nothing.
    asking = threading.Thread(target=ask, name="dtrain rendezvous", daemon=True)
    asking.start()
    asking.join(answer_s + 1)
    return answers[0] if answers else None


def _listener(port: int) -> str:
    """Names the process that listens at a port of this host, where the kernel tells."""
    import psutil  # accelerate's; late, as only a failure needs it

    with suppress(psutil.Error, OSError):
        for one in psutil.net_connections("tcp"):
            if one.status == "LISTEN" and one.laddr[1] == port and one.pid:
                command = " ".join(psutil.Process(one.pid).cmdline())
                return f" by process {one.pid} ({command[:120]})"
    return ""


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_ANSWER_S).close()
    except OSError:
        return False
    return True
