"""Who am I? Rank, host, device and process group, from whatever launched this process."""

import atexit
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from dtrain.distributed.activity import Heartbeat, heartbeat_key
from dtrain.distributed.comm import Comm
from dtrain.distributed.environment import (
    allow_files,
    check_cards,
    find_launcher,
    has_gpu,
    share_cores,
)
from dtrain.distributed.health import look_over, wanted
from dtrain.distributed.processes import is_failing, this_machine
from dtrain.distributed.random_streams import has_seeded, random_state_kept, seed_everything
from dtrain.distributed.rendezvous import own_store, serve_apart
from dtrain.distributed.transport import GroupTransport, Transport, open_default, open_gloo
from dtrain.errors import ConfigError

T = TypeVar("T")

# Counts worlds opened one after another, so that one does not read what another left behind.
_lives = itertools.count()


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
        launcher: ``"torchrun"``, ``"slurm"``, ``"solo"`` or ``"threads"``.
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
    #: What gradients travel over; for strategies.
    gradients: Transport = field(default_factory=GroupTransport, repr=False)
    #: Opens a connection of its own to the rendezvous store; None where there is none.
    connect: Callable[[], Store] | None = field(default=None, repr=False)
    #: Opens labelled verbs for a thread beside the main one; all ranks call it. The same ones each
    #: time, so whoever uses them holds their lock. None where ranks are threads themselves.
    open_comm: Callable[[], Comm] | None = field(default=None, repr=False)
    #: Of those that ``connect`` has opened, the ones that nobody uses at the moment.
    idle_connections: list[Store] = field(default_factory=list, repr=False)
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

            get_error_handler().record_exception(error)

    def close(self) -> None:
        """Closes the process group, if :func:`init` opened it. A second call does nothing."""
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
        LaunchError: the environment is half set, or ranks of a host have the same GPU.
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


def _open(seed: int, timeout_s: float) -> World:
    launcher, variables = find_launcher(os.environ)
    host = socket.gethostname()
    size = int(variables.get("WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    if launcher == "solo" or size == 1:
        device = torch.device("cuda" if has_gpu() else "cpu")
        world = World(0, 0, 1, host, device, "none", launcher, seed, Comm(host=host))
        world.open_comm = lambda: Comm(host=host)
        return world
    os.environ.update(variables)
    share_cores()
    allow_files(size)
    store_process = serve_apart(timeout_s)
    # Late: most of a single process's start would go into this import.
    from accelerate.state import PartialState

    if store_process is not None:
        store_process.wait()
    # Imported later, as DistributedDataParallel does, its functions' default arguments would keep
    # the process group until the interpreter ends, and the process may abort then.
    from torch.distributed.nn import functional as _functional  # noqa: F401

    timeout, life = timedelta(seconds=timeout_s), next(_lives)
    opened = not dist.is_initialized()
    if opened:
        if has_gpu():
            check_cards(os.environ, host, own_store(timeout, life))
        open_default(timeout, life)
    # It finds the group, and keeps which rank and device are this process's: true of each life.
    device = PartialState(cpu=not has_gpu()).device
    rank, transport, store = dist.get_rank(), open_gloo(timeout), own_store(timeout, life)
    store.set(heartbeat_key(rank), Heartbeat(rank, host, os.getpid(), this_machine(), 0).to_json())
    if store_process is not None and rank == 0:
        keys = [heartbeat_key(one) for one in range(size)]
        store_process.tell([Heartbeat.from_json(one) for one in store.multi_get(keys)])
    if device.type == "cpu":
        device = torch.device("cpu")  # which has no number; PartialState gives it one
    local_rank, backend = int(os.environ["LOCAL_RANK"]), dist.get_backend()
    comm = Comm(rank=rank, size=size, host=host, transport=transport, store=store)
    world = World(rank, local_rank, size, host, device, backend, launcher, seed, comm)
    world.connect, world._opened = lambda: own_store(timeout, life), opened

    # One for all Trainers: each further group would make the next one slower to open.
    @cache
    def open_comm() -> Comm:
        apart = Comm(rank=rank, size=size, host=host, transport=open_gloo(timeout))
        world.at_close(apart.close)
        return apart

    world.open_comm = open_comm
    atexit.register(world._close_at_exit)
    return world
