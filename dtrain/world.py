"""Who am I? Rank, host, device and process group, from whatever launched this process.

torchrun and ``accelerate launch`` describe a rank in ``RANK``, ``WORLD_SIZE`` and so on;
``srun`` in ``SLURM_PROCID`` and so on, which are translated. Without either, this process is
the whole world and no process group is opened.
"""

from __future__ import annotations

import atexit
import itertools
import os
import random
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from dtrain.beats import Beat, beat_key, this_machine
from dtrain.comm import Comm
from dtrain.errors import ConfigError, LaunchError
from dtrain.store_process import ELSEWHERE, END
from dtrain.wire import GroupWire, Wire
from dtrain.yielding import yielding_threads

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 600.0
_RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
_SERVED_ELSEWHERE = "TORCHELASTIC_USE_AGENT_STORE"  # tells torch that rank 0 is not to serve it
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(eq=False)
class World:
    """This process's place among the ranks, and the means to reach the others.

    Attributes:
        rank: 0 to ``size - 1``.
        local_rank: the rank within this host.
        size: how many ranks there are (the world size).
        host: this host's name.
        device: where this rank computes.
        backend: ``"nccl"``, ``"gloo"``, ``"threads"`` where ranks are those of a test, or
            ``"none"`` in a world of one.
        launcher: ``"torchrun"``, ``"slurm"``, ``"solo"`` or ``"threads"``.
        seed: what all random streams are derived from.
        comm: labelled verbs to the other ranks.
        gradients: what gradients travel over; for strategies.
        connect: opens a connection of its own to the rendezvous store; None where there is none.
        open_comm: opens labelled verbs of their own, for a thread beside the main one; all ranks
            call it. The same ones each time, so whoever uses them holds their lock. None where no
            thread can be beside (ranks of a test that are threads).
    """

    rank: int
    local_rank: int
    size: int
    host: str
    device: torch.device
    backend: str
    launcher: str
    seed: int
    comm: Comm
    gradients: Wire = field(default_factory=GroupWire, repr=False)
    connect: Callable[[], Store] | None = field(default=None, repr=False)
    open_comm: Callable[[], Comm] | None = field(default=None, repr=False)
    #: Of those that ``connect`` has opened, the ones that nobody uses at the moment.
    idle_connections: list[Store] = field(default_factory=list, repr=False)
    _opened: bool = field(default=False, repr=False)
    _closers: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    @property
    def restarted(self) -> bool:
        """True where torchrun or SLURM started this again by itself."""
        counts = (os.environ.get(name, "0") for name in _RESTART_COUNTS)
        return any(count not in ("", "0") for count in counts)

    def at_close(self, release: Callable[[], None]) -> None:
        """Has ``release`` called before the process group is closed.

        For whoever holds something that holds the process group.

        Ranks: all, local.
        """
        self._closers.append(release)

    def tell_launcher(self, error: BaseException) -> None:
        """Leaves ``error``, which is being handled, where torchrun looks for a root cause.

        Ranks: all, local.
        """
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            # Late: it takes a while to import, and only a failure needs it.
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)

    def close(self) -> None:
        """Closes the process group, if :func:`init` opened it. A second call does nothing.

        Ranks: all, local.
        """
        global _current  # noqa: PLW0603 -- see `_current`
        if _current is self:
            _current = None
        if self._opened:
            self._opened = False
            atexit.unregister(self._close_at_exit)
            # A process group ends its threads when the last reference to it goes. Should that
            # be while the interpreter ends, the process may abort: so it has to be here.
            for release in self._closers:
                release()
            self._closers.clear()
            self.idle_connections.clear()
            self.comm.close()
            dist.destroy_process_group()
            _forget_partial_state()

    def _close_at_exit(self) -> None:
        # After an uncaught error, closing may wait for ranks that are stuck: just leave.
        if not _is_failing():
            self.close()

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()


# Counts worlds opened one after another, so that one does not read what another left behind.
_lives = itertools.count()

# torch's process group exists once in a process, and so does what dtrain knows of it.
_current: World | None = None

# Where ranks are threads, each has its own instead; see `inhabited`.
_of_thread: ContextVar[World | None] = ContextVar("_of_thread", default=None)


def init(*, seed: int = 0, timeout_s: float = DEFAULT_TIMEOUT_S) -> World:
    """Finds out who this rank is, opens the process group, and seeds every random stream.

    Call it first, before the model is made: the ranks then make equal models. A second call
    returns the same world, seeded anew. The result is also a context manager that closes
    what it opened.

    Args:
        seed: a number from 0 to 2**32 - 1; Python's, NumPy's and torch's streams start from
            it, equal on all ranks. ``Trainer.fit`` gives each rank a stream of its own.
        timeout_s: how long, in seconds, a rank waits for the others before it gives up.

    Raises:
        LaunchError: the environment is half set.
        ConfigError: ``seed`` or ``timeout_s`` is out of range.

    Ranks: all, communicates.
    """
    global _current  # noqa: PLW0603 -- see `_current`
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed}: must be from 0 to 2**32 - 1")
    if timeout_s <= 0:
        raise ConfigError(f"timeout_s={timeout_s}: must be more than 0 seconds")
    world = current()
    if world is None:
        world = _current = _open(seed, timeout_s)
    world.seed = seed
    seed_everything(seed)
    return world


def current() -> World | None:
    """Returns the world that :func:`init` made, or None before it was called.

    Ranks: all, local.
    """
    return _of_thread.get() or _current


@contextmanager
def inhabited(world: World) -> Iterator[None]:
    """Makes ``world`` this thread's own in the block: :func:`init` and :func:`current` return it.

    For ranks that are threads of one process.

    Ranks: all, local.
    """
    token = _of_thread.set(world)
    try:
        yield
    finally:
        _of_thread.reset(token)


def on_main(label: str, fn: Callable[[], T]) -> T:
    """Rank 0 calls ``fn``; every rank gets its result, or its failure. For scripts.

    Example::

        path = dtrain.on_main("download", lambda: fetch_dataset())

    Raises:
        RemoteError: ``fn`` raised on rank 0, where the original error is raised.

    Ranks: all, communicates; ``fn`` runs on rank 0 only.
    """
    return (current() or init()).comm.on_main(label, fn)


def seed_everything(seed: int, *stream: int) -> None:
    """Seeds Python's, NumPy's and torch's generators from ``seed`` and a stream's numbers.

    Ranks: all, local.
    """
    word = derive_seed(seed, *stream) if stream else seed
    random.seed(word)
    np.random.seed(word % 2**32)
    torch.manual_seed(word)


def derive_seed(seed: int, *stream: int) -> int:
    """Returns a 63-bit seed for the stream that ``stream`` numbers; streams are independent.

    Ranks: all, local.
    """
    # The length goes in as well: SeedSequence takes [1] and [1, 0] for the same.
    words = np.random.SeedSequence([seed, len(stream), *stream]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def find_launcher(env: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Says what launched this process, and the rendezvous variables that follow from it.

    Args:
        env: the environment.

    Returns:
        ``"torchrun"``, ``"slurm"`` or ``"solo"``; and the variables to add to the environment.

    Raises:
        LaunchError: some of torchrun's variables are set and others are not, or a number is
            no number.

    Ranks: all, local.
    """
    given = [name for name in _RENDEZVOUS if env.get(name)]
    # MASTER_ADDR and MASTER_PORT alone are often left over in cluster profiles.
    if any(name in given for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        missing = [name for name in _RENDEZVOUS if name not in given]
        if missing:
            raise LaunchError(
                f"the environment has {_show(env, given)} but not {', '.join(missing)}. Start "
                "with torchrun (`torchrun --nproc-per-node=2 train.py`), or unset them all to "
                "run in one process."
            )
        numbers = {name: _number(env, name) for name in _RENDEZVOUS if name != "MASTER_ADDR"}
        if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
            raise LaunchError(f"RANK must be from 0 to WORLD_SIZE - 1: {_show(env, given)}")
        return "torchrun", {}
    # Only srun sets SLURM_STEP_NUM_TASKS; in a bare sbatch script one process runs.
    if env.get("SLURM_STEP_NUM_TASKS") and _number(env, "SLURM_STEP_NUM_TASKS") > 1:
        needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
        missing = [name for name in needed if not env.get(name)]
        if missing:
            raise LaunchError(
                f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks, but the environment has no "
                f"{', '.join(missing)}. Start with srun, or unset SLURM_STEP_NUM_TASKS."
            )
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
        return "slurm", {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(_tasks_per_node(env)),
            "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(nodes),
            # Two jobs on a node must not meet: the port follows from the job's number.
            "MASTER_PORT": env.get("MASTER_PORT")
            or str(20000 + _number(env, "SLURM_JOB_ID") % 20000),
        }
    return "solo", {}


def first_host(nodelist: str) -> str:
    """Returns the first host of a SLURM node list: ``gpu[03-05,9],x1`` gives ``gpu03``.

    Ranks: all, local.
    """
    # The first entry ends at the first comma outside of brackets; of each bracket, the first
    # number of the first range counts.
    entry = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodelist)
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", entry[0]) if entry is not None else ""
    if not host or nodelist.startswith("["):
        raise LaunchError(
            f"cannot read the first host from SLURM's node list {nodelist!r}; set MASTER_ADDR to "
            "the host of task 0"
        )
    return host


def _tasks_per_node(env: Mapping[str, str]) -> int:
    first = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return int(first[0]) if first else 1


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise LaunchError(f"{name}={env[name]!r} is no number") from None


def _show(env: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{name}={env[name]}" for name in names)


def _open(seed: int, timeout_s: float) -> World:
    launcher, variables = find_launcher(os.environ)
    host = socket.gethostname()
    size = int(variables.get("WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    if launcher == "solo" or size == 1:
        device = torch.device("cuda" if _has_gpu() else "cpu")
        world = World(0, 0, 1, host, device, "none", launcher, seed, Comm(host=host))
        world.open_comm = lambda: Comm(host=host)
        return world
    os.environ.update(variables)
    # One thread each unless told otherwise: ranks that share a host share its cores.
    if not os.environ.get("OMP_NUM_THREADS"):
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        threads = max(1, (os.cpu_count() or 1) // local_size)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    _allow_files(size)
    serving = _serve_apart(timeout_s)
    # Late: most of a single process's start would go into this import.
    from accelerate.state import PartialState

    if serving is not None:
        _await_store(serving)
    # Imported later, as DistributedDataParallel does, its functions' default arguments would keep
    # the process group until the interpreter ends, and the process may abort then.
    from torch.distributed.nn import functional as _functional  # noqa: F401

    opened = not dist.is_initialized()
    life = next(_lives)
    timeout = timedelta(seconds=timeout_s)
    options: dict[str, Any] = {"timeout": timeout}
    if life:
        # A store that lives on still has the addresses of the group that was closed.
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        options |= {"store": PrefixStore(f"life-{life}", store), "rank": rank, "world_size": size}
    with nullcontext() if _has_gpu() else yielding_threads():  # NCCL's stay as they are
        state = PartialState(cpu=not _has_gpu(), **options)
    with yielding_threads():
        control = dist.new_group(backend="gloo", timeout=timeout)
    rank = dist.get_rank()
    wire, store = GroupWire(control), _own_store(timeout, life)
    comm = Comm(rank=rank, size=size, host=host, wire=wire, store=store)
    hello = Beat(rank=rank, host=host, pid=os.getpid(), machine=this_machine(), number=0)
    store.set(beat_key(rank), hello.to_json())
    if serving is not None:
        keys = [beat_key(one) for one in range(size)]
        _tell_store(serving, [Beat.from_json(one) for one in store.multi_get(keys)])
    world = World(
        rank=rank,
        local_rank=state.local_process_index,
        size=size,
        host=host,
        # A CPU has no number; PartialState gives it one.
        device=torch.device("cpu" if state.device.type == "cpu" else state.device),
        backend=dist.get_backend(),
        launcher=launcher,
        seed=seed,
        comm=comm,
        connect=lambda: _own_store(timeout, life),
        _opened=opened,
    )

    # One for all Trainers: each further group would make the next one slower to open.
    @cache
    def open_comm() -> Comm:
        with yielding_threads():
            group = dist.new_group(backend="gloo", timeout=timeout)
        apart = Comm(rank=rank, size=size, host=host, wire=GroupWire(group))
        world.at_close(apart.close)
        return apart

    world.open_comm = open_comm
    atexit.register(world._close_at_exit)
    return world


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


def _tell_store(process: subprocess.Popen[str], ranks: list[Beat]) -> None:
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


def _has_gpu() -> bool:
    """There is one, and ``accelerate launch --cpu`` did not say to leave it alone."""
    told_not_to = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return torch.cuda.is_available() and not told_not_to


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


def _forget_partial_state() -> None:
    """Lets a later :func:`init` in this process find a new world (the state is a singleton)."""
    from accelerate.state import PartialState

    PartialState._reset_state()
