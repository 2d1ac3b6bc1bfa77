"""Ranks for tests as threads of this process: milliseconds instead of a second.

Only the transport is another than that of real ranks, and they take turns.
"""

import socket
import threading
import traceback
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.distributed import (
    Comm,
    TransportOp,
    World,
    inhabited,
    local_store,
    random_state_of_host,
    restore_random_state,
)
from dtrain.errors import ConfigError, DtrainError
from dtrain.step import MicroStep
from dtrain.testing.outcomes import Outcome, values_of
from dtrain.testing.turns import Turns

DEFAULT_TIMEOUT_S = 20.0
_REDUCE: dict[str, Any] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = DEFAULT_TIMEOUT_S
) -> list[Any]:
    """Runs ``fn(*args)`` on ``world_size`` ranks that are threads; returns each one's result.

    In ``fn``, ``dtrain.init()`` gives the rank's world, and a Trainer trains as it does on real
    ranks, on the CPU. One rank runs at a time, until it waits for the others in a verb or in the
    reduction of gradients; so a test runs the same way each time. Python's, NumPy's and torch's
    global random streams are each rank's own, and begin as they are here. All else is shared, also
    what ``fn`` finds outside of itself: make model, optimizer and callbacks inside of it.

    Example::

        def double_rank():
            world = dtrain.init()
            return world.comm.all_reduce("sum", torch.tensor(world.rank)).item()

        assert run_ranks(double_rank, 3) == [3, 3, 3]

    Args:
        fn: any function; nothing is pickled but what verbs send.
        world_size: how many ranks.
        *args: the same for each rank.
        timeout_s: for all of it, in seconds. A thread that is stuck by then is left behind.

    Raises:
        RanksFailed: a rank raised or ran out of time; it has every rank's outcome.

    Ranks: none; called in the test's process.
    """
    return values_of(try_ranks(fn, world_size, *args, timeout_s=timeout_s))


def try_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = DEFAULT_TIMEOUT_S
) -> list[Outcome]:
    """Like :func:`run_ranks`, but returns every rank's outcome, by rank, whatever became of it.

    Raises:
        ConfigError: there is no rank, or no time.
    """
    if world_size < 1 or timeout_s <= 0:
        raise ConfigError(f"world_size={world_size}, timeout_s={timeout_s}: must be more than 0")
    before, threads_of_torch = random_state_of_host(), torch.get_num_threads()
    turns = Turns(world_size, timeout_s)
    outcomes: dict[int, Outcome] = {}
    host, store = socket.gethostname(), local_store()

    def world_of(rank: int) -> World:
        verbs = ThreadTransport(turns, rank, world_size, "a verb of dtrain's comm")
        comm = Comm(rank=rank, size=world_size, host=host, transport=verbs, store=store)
        return World(
            rank=rank,
            local_rank=rank,
            size=world_size,
            host=host,
            device=torch.device("cpu"),
            backend="threads" if world_size > 1 else "none",
            launcher="threads",
            seed=0,
            comm=comm if world_size > 1 else Comm(host=host),
            gradients=ThreadTransport(turns, rank, world_size, "the reduction of gradients"),
        )

    def run(rank: int, world: World) -> None:
        try:
            with inhabited(world), turns.seated(rank):
                outcomes[rank] = Outcome(rank, fn(*args), None, "")
        except BaseException as error:  # noqa: BLE001 -- told to the test
            outcomes[rank] = Outcome(rank, None, error, traceback.format_exc())

    # Daemons: one that is stuck must not keep the interpreter from ending.
    threads = [
        threading.Thread(target=run, args=(rank, world_of(rank)), name=f"rank {rank}", daemon=True)
        for rank in range(world_size)
    ]
    # As real ranks of one host have by default; and sums are then the same on every machine.
    torch.set_num_threads(1)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(turns.seconds_left() + 1)  # those that only wait leave by themselves
    finally:
        turns.end("the test is over")
        restore_random_state(before)
        torch.set_num_threads(threads_of_torch)
    for rank in {*range(world_size)} - {*outcomes}:
        why = f"rank {rank} did not come back in time and was left behind{turns.where_is(rank)}"
        outcomes[rank] = Outcome(rank, None, DtrainError(why), "")
    return [outcomes[rank] for rank in range(world_size)]


class ThreadTransport:
    """One rank's end of a transport between threads; see ``dtrain.distributed``'s.

    Each transport has meetings of its own; errors name them by ``what``.

    Ranks: all, communicates.
    """

    def __init__(self, turns: Turns, rank: int, size: int, what: str) -> None:
        self._rank, self.size = rank, size
        # Every rank's value, by rank. It must not be changed any more.
        self.exchange: Callable[[Any], list[Any]] = partial(turns.meet, rank, what)

    def all_gather(self, parts: list[Tensor], mine: Tensor) -> None:
        for part, theirs in zip(parts, self._meet("all_gather", mine), strict=True):
            part.copy_(theirs)

    def all_reduce(self, buffer: Tensor, op: TransportOp = "sum") -> None:
        buffer.copy_(reduce(_REDUCE[op], self._meet(f"all_reduce {op}", buffer)))

    def broadcast(self, buffer: Tensor) -> None:
        buffer.copy_(self._meet("broadcast", buffer)[0])

    def data_parallel(self, module: nn.Module, **options: Any) -> "Averaged":
        """Wraps ``module``: its backward reduces gradients as DistributedDataParallel's does.

        Of the options, only ``find_unused_parameters`` makes a difference.
        """
        assert isinstance(module, MicroStep)
        self.check_own(module)
        return Averaged(module, self, bool(options.get("find_unused_parameters")))

    def check_own(self, module: nn.Module) -> None:
        """Raises ConfigError if ranks share one model."""
        places = {p.data_ptr() for p in module.parameters() if p.numel()}
        for rank, theirs in enumerate(self.exchange(places)):
            if rank != self._rank and places & theirs:
                raise ConfigError(
                    f"ranks {self._rank} and {rank} share one model: ranks are threads here, so "
                    "make model, optimizer and callbacks in the function that each rank runs"
                )

    def _meet(self, call: str, mine: Tensor) -> list[Tensor]:
        # A copy: its owner may change it before the others have had their turns.
        brought = self.exchange((call, mine.detach().clone()))
        calls = {f"{call} {t.dtype}{list(t.shape)}" for call, t in brought}
        if len(calls) > 1:
            raise RuntimeError(f"ranks met on the transport in different calls: {sorted(calls)}")
        return [theirs for _, theirs in brought]


class Averaged:
    """A micro-step whose last backward leaves the mean of all ranks' gradients.

    As with DistributedDataParallel, nothing is reduced where a gradient is missing (the lane then
    tells), unless ``find_unused``; and each rank's gradient is divided before they are summed.
    """

    def __init__(
        self, micro_step: MicroStep, transport: ThreadTransport, find_unused: bool
    ) -> None:
        self._micro_step, self._transport, self._find_unused = micro_step, transport, find_unused
        apart = vars(micro_step).get("_ddp_params_and_buffers_to_ignore", ())
        named = micro_step.named_parameters()
        self._params = [p for name, p in named if p.requires_grad and name not in apart]
        # The lane's gradient arrives last, and only in the last backward of a step. The hook must
        # end with this object: another one takes its place where parameters are frozen.
        itself = weakref.ref(self)

        def arrived(_: Tensor) -> None:
            if (wrapped := itself()) is not None:
                wrapped._reduce()

        hook = micro_step.lane.param.register_post_accumulate_grad_hook(arrived)
        weakref.finalize(self, hook.remove).atexit = False

    def __call__(self, *args: Any) -> Any:
        return self._micro_step(*args)

    def no_sync(self) -> nullcontext[None]:
        return nullcontext()

    def register_comm_hook(self, state: Any, hook: Any) -> None:
        raise ConfigError("DDP(comm_hook=...) needs real ranks: test it with run_processes")

    def _reduce(self) -> None:
        params = self._params
        # A frozen one is given nothing by autograd; DistributedDataParallel then takes zeros.
        if not self._find_unused and any(p.grad is None and p.requires_grad for p in params):
            return
        share = 1 / self._transport.size
        shares = [None if p.grad is None else p.grad * share for p in params]
        everyones: list[list[Tensor | None]] = self._transport.exchange(shares)
        if any(len(theirs) != len(shares) for theirs in everyones):
            raise RuntimeError("ranks reduce the gradients of different parameters")
        for parameter, parts in zip(params, zip(*everyones, strict=True), strict=True):
            given = [part for part in parts if part is not None]
            if not given:
                continue
            total = reduce(torch.add, given)
            if parameter.grad is None or parameter.grad.is_sparse:
                parameter.grad = total.clone()
            else:
                parameter.grad.copy_(total)
