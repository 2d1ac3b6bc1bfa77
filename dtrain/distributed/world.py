"""Who am I? Rank, host, device and process group, from whatever launched this process."""

import atexit
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from dtrain.distributed.activity import Heartbeat, heartbeat_key
from dtrain.distributed.comm import Comm
from dtrain.distributed.environment import allow_files, has_gpu, share_cores
from dtrain.distributed.grid import Grid, Groups, open_groups
from dtrain.distributed.health import look_over, wanted
from dtrain.distributed.launchers import RENDEZVOUS, find_launcher, hint
from dtrain.distributed.processes import is_failing, this_machine
from dtrain.distributed.random_streams import has_seeded, random_state_kept, seed_everything
from dtrain.distributed.rendezvous import own_store, scripts_store
from dtrain.distributed.starting import around_open_group, come_together
from dtrain.distributed.transport import GroupTransport, Transport, open_default, open_gloo
from dtrain.errors import ConfigError, RemoteError

T = TypeVar("T")

# What the last world has added to the environment, and who had launched it by what was there.
_added: dict[str, str] = {}
_launched_by = ""
# How many worlds were opened, one after another: one must not read what another left behind.
_lives = [0]


@dataclass(eq=False)
class World:
    """This process's place among the ranks, and the means to reach the others.

    Attributes:
        rank: 0 to ``size - 1``.
        local_rank: the rank within this host.
        size: how many ranks there are (the world size).
        host: this host's name.
        device: where this rank computes.
        backend: ``"nccl"``, ``"gloo"``, ``"threads"`` (of a test), or ``"none"`` in a world of one.
        launcher: ``"torchrun"`` (or who sets the same variables), ``"slurm"``, ``"mpi"``,
            ``"lsf"`` (jsrun), ``"kubernetes"``, ``"ray"``, ``"script"`` (it opened the group
            itself, and no launcher's variables say more), ``"solo"`` or ``"threads"``.
        seed: what all random streams are derived from.
        comm: labelled verbs to the other ranks.
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
    #: False where a rank before has the same samples, whose figures count (tensor parallel).
    counts: bool = field(default=True, repr=False)
    #: What gradients travel over; for strategies.
    gradients: Transport = field(default_factory=GroupTransport, repr=False)
    #: Opens a connection of its own to the rendezvous store; None where there is none.
    connect: Callable[[], Store] | None = field(default=None, repr=False)
    #: Opens labelled verbs for a thread beside the main one; all ranks call it. The same ones each
    #: time, so whoever uses them holds their lock. None where ranks are threads themselves.
    open_comm: Callable[[], Comm] | None = field(default=None, repr=False)
    #: Opens, or returns, this rank's process groups in a grid of all ranks; all ranks call it. None
    #: where ranks are threads, or one.
    open_groups: Callable[[Grid], Groups] | None = field(default=None, repr=False)
    #: Of those that ``connect`` has opened, the ones that nobody uses at the moment.
    idle_connections: list[Store] = field(default_factory=list, repr=False)
    #: The watchdog's thread, between two fits; at most one, with a ``stop()``.
    resting: list[Any] = field(default_factory=list, repr=False)
    #: Why this process is to end, once a fit of it was told to leave.
    told_to_leave: str = field(default="", repr=False)
    _alive: bool = field(default=False, repr=False)
    #: Has opened torch's default group; else the script has, and closes it.
    _opened: bool = field(default=False, repr=False)
    _closers: list[Callable[[], None]] = field(default_factory=list, repr=False)
    #: A Trainer has made it, and the script had seeded nothing.
    _by_chance: bool = field(default=False, repr=False)
    #: This process and its parent, as the world was made.
    _family: tuple[int, int] = field(
        default_factory=lambda: (os.getpid(), os.getppid()), repr=False
    )

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    @property
    def restarted(self) -> bool:
        """True where torchrun or SLURM started this again by itself."""
        names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
        return any(os.environ.get(name, "0") not in ("", "0") for name in names)

    def at_close(self, release: Callable[[], None]) -> None:
        """Has ``release`` let go of the process group before it is closed."""
        self._closers.append(release)

    def tell_launcher(self, error: BaseException) -> None:
        """Leaves ``error``, which is being handled, where torchrun looks for a root cause."""
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            # Late: it takes a while to import, and only a failure needs it.
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            if isinstance(error, RemoteError):
                try:  # what failed is elsewhere: this rank's own stack tells nothing of it
                    raise RemoteError(str(error)) from None
                except RemoteError as bare:
                    get_error_handler().record_exception(bare)
            else:
                get_error_handler().record_exception(error)

    def close(self) -> None:
        """Closes what :func:`init` opened. A second call does nothing."""
        global _current  # noqa: PLW0603 -- see `_current`
        if _current is self:
            _current = None
        if self._alive:
            self._alive = False
            atexit.unregister(self._close_at_exit)
            # A process group ends its threads when the last reference to it goes. Should that
            # be while the interpreter ends, the process may abort: so it has to be here.
            while self.resting:
                self.resting.pop().stop()
            for release in self._closers:
                release()
            self._closers.clear()
            self.idle_connections.clear()
            self.comm.close()
            if self._opened:
                dist.destroy_process_group()

    def _close_at_exit(self) -> None:
        # After an uncaught error, closing may wait for ranks that are stuck: just leave.
        if not is_failing():
            self.close()

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()


# torch's process group exists once in a process, and so does what dtrain knows of it.
_current: World | None = None
# Where ranks are threads, each has its own instead; see `inhabited`.
_of_thread: ContextVar[World | None] = ContextVar("_of_thread", default=None)


def init(*, seed: int = 0, timeout_s: float = 600.0, health: bool = True) -> World:
    """Finds out who this rank is, opens the process group, and seeds every random stream.

    Call it first: the ranks then make equal models. A second call returns the same world, seeded
    anew. The result is also a context manager that closes what it opened.

    Args:
        seed: a number from 0 to 2**32 - 1; Python's, NumPy's and torch's streams start from
            it, equal on all ranks. ``Trainer.fit`` gives each rank a stream of its own.
        timeout_s: how long, in seconds, a rank waits for the others before it gives up.
        health: on several nodes, warn of one that is slower than half the median, which takes a
            second or two. ``DTRAIN_HEALTH=off`` does without as well.

    Raises:
        LaunchError: the environment is half set, ranks do not meet (another job has the port, a
            name does not resolve, a rank does not come), or ranks of a host have the same GPU.
        ConfigError: ``seed`` or ``timeout_s`` is out of range, or ``DTRAIN_HEALTH`` unknown.

    Ranks: all, communicates.
    """
    global _current  # noqa: PLW0603 -- see `_current`
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed}: must be from 0 to 2**32 - 1")
    if timeout_s <= 0:
        raise ConfigError(f"timeout_s={timeout_s}: must be more than 0 seconds")
    world = current()
    if world is None:
        look = wanted(health)
        world = _current = _open(seed, timeout_s)
        world.idle_connections += look_over(
            world.connect,
            world.rank,
            world.size,
            device=world.device,
            backend=world.backend,
            look=look,
        )
    world.seed = seed
    seed_everything(seed)
    return world


def init_late(seed: int) -> World:
    """Does what :func:`init` does, for a Trainer whose script has not.

    What the script has seeded itself goes on as it would without us.
    """
    seeded = has_seeded()
    with random_state_kept() if seeded else nullcontext():
        world = init(seed=seed)
    world._by_chance = not seeded
    return world


def check_seeded(world: World) -> list[str]:
    """Returns what to tell the user where a rank drew by chance; once. Ranks: all, communicates."""
    everyones = world.comm.gather_objects("seeded", world._by_chance)
    world._by_chance = False
    if not any(everyones):
        return []
    ranks = ", ".join(str(rank) for rank, by_chance in enumerate(everyones) if by_chance)
    return [
        f"note: rank {ranks} called neither dtrain.init(seed=...) nor torch.manual_seed before the "
        "Trainer was made: what was drawn until then, such as weights or a split of the data, is "
        "another in each run. Call dtrain.init first."
    ]


def current() -> World | None:
    """Returns the world that :func:`init` made, or None before it was called."""
    return _of_thread.get() or _current


def launcher_gone(world: World) -> Callable[[], bool] | None:
    """Returns what says whether the torchrun that started this process is gone.

    None where something else did, whose end need not mean anything.
    """
    own, parent = world._family
    by_torchrun = world.launcher == "torchrun" and "TORCHELASTIC_RUN_ID" in os.environ
    if not by_torchrun or os.getpid() != own:  # a child of a rank's has another parent
        return None
    return lambda: os.getppid() != parent


@contextmanager
def inhabited(world: World) -> Iterator[None]:
    """Makes ``world`` this thread's own in the block, for ranks that are threads."""
    token = _of_thread.set(world)
    try:
        yield
    finally:
        _of_thread.reset(token)


def on_main(label: str, fn: Callable[[], T]) -> T:
    """Does what :meth:`Comm.on_main` does, in scripts.

    Example::

        path = dtrain.on_main("download", lambda: fetch_dataset())

    Ranks: all, communicates; ``fn`` runs on rank 0 only.
    """
    return (current() or init()).comm.on_main(label, fn)


def _close_scripts_group() -> None:
    if dist.is_initialized() and not is_failing():  # else its threads may abort the process
        dist.destroy_process_group()


@cache
def _note(line: str) -> None:  # once in a process
    if line:
        sys.stderr.write(f"dtrain: note: {line}\n")


def _open(seed: int, timeout_s: float) -> World:
    global _added, _launched_by
    opens, host = not dist.is_initialized(), socket.gethostname()
    launcher, variables = find_launcher(os.environ) if opens else around_open_group()
    if _added and _added.items() <= os.environ.items():
        launcher = _launched_by
    size = int(variables.get("WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    size = size if opens else dist.get_world_size()
    if launcher == "solo" or size == 1:
        if launcher == "solo":
            _note(hint(os.environ))
        device = torch.device("cuda" if has_gpu() else "cpu")
        world = World(0, 0, 1, host, device, "none", launcher, seed, Comm(host=host))
        world.open_comm = lambda: Comm(host=host)
        return world
    allow_files(size)
    timeout, life = timedelta(seconds=timeout_s), _lives[0]
    connect = partial(own_store if opens else scripts_store, timeout, life)
    # Late: most of a single process's start would go into this import.
    from accelerate.state import PartialState

    rank, local_rank, local_size, store_process = come_together(
        launcher, variables, size, connect, timeout_s, opens=opens
    )
    _lives[0] += 1
    # Imported later, as DistributedDataParallel does, its functions' default arguments would keep
    # the process group until the interpreter ends, and the process may abort then.
    from torch.distributed.nn import functional as _functional  # noqa: F401

    if variables:
        _added, _launched_by = variables, launcher
    share_cores(local_size)
    if opens:
        open_default(connect(), rank, size, timeout)
    if PartialState._shared_state or all(map(os.environ.get, RENDEZVOUS)):
        # It finds the group, and keeps which rank and device are this process's: true of each life.
        device = PartialState(cpu=not has_gpu()).device
    else:  # without a launcher's variables, it would take this for a world of one
        device = torch.device("cpu")
        if has_gpu():
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
    transport, store = open_gloo(timeout), connect()
    store.set(heartbeat_key(rank), Heartbeat(rank, host, os.getpid(), this_machine(), 0).to_json())
    if store_process is not None and rank == 0:
        keys = [heartbeat_key(one) for one in range(size)]
        store_process.tell([Heartbeat.from_json(one) for one in store.multi_get(keys)])
    if device.type == "cpu":
        device = torch.device("cpu")  # which has no number; PartialState gives it one
    comm = Comm(rank=rank, size=size, host=host, transport=transport, store=store)
    backend = dist.get_backend()
    world = World(rank, local_rank, size, host, device, backend, launcher, seed, comm)
    world.connect, world._opened = connect, opens

    # One for all Trainers: each further group would make the next one slower to open.
    @cache
    def open_comm() -> Comm:
        apart = Comm(rank=rank, size=size, host=host, transport=open_gloo(timeout))
        world.at_close(apart.close)
        return apart

    world.open_comm = open_comm
    world.open_groups = cache(partial(open_groups, rank=rank, timeout=timeout))
    world._alive = True
    if not opens:
        atexit.register(_close_scripts_group)
    atexit.register(world._close_at_exit)
    return world
