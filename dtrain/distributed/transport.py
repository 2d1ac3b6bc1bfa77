"""How tensors get from rank to rank: a process group of torch's, or what threads have instead."""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from dtrain.distributed.environment import has_gpu

TransportOp = Literal["sum", "max", "min"]

_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class DataParallel(Protocol):
    """A module whose backward leaves the mean of all ranks' gradients."""

    def __call__(self, *args: Any) -> Any:
        """Runs the module's forward."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Within it, backward adds up this rank's gradients only."""

    def register_comm_hook(self, state: Any, hook: Any) -> None:
        """Has ``hook`` reduce each bucket of gradients instead."""


class Transport(Protocol):
    """Moves tensors between ranks: all make the same calls, in the same order, but ``check_own``.

    A call that cannot be completed, as another rank has left or is late, raises RuntimeError.
    """

    def all_gather(self, parts: list[Tensor], mine: Tensor) -> None:
        """Fills ``parts`` with every rank's ``mine``; shape and dtype are equal on all ranks."""

    def all_reduce(self, buffer: Tensor, op: TransportOp = "sum") -> None:
        """Reduces ``buffer`` over all ranks, in place."""

    def broadcast(self, buffer: Tensor) -> None:
        """Gives every rank rank 0's ``buffer``, in place."""

    def check_own(self, module: nn.Module) -> None:
        """Raises where ranks that are threads of one process share ``module``."""

    def data_parallel(self, module: nn.Module, **options: Any) -> DataParallel:
        """Returns ``module``, wrapped in DistributedDataParallel or what does the same."""


@dataclass
class GroupTransport:
    """A process group of torch's, as :class:`Transport`."""

    group: dist.ProcessGroup | None = None  # the default one if None, which may open later

    def all_gather(self, parts: list[Tensor], mine: Tensor) -> None:
        """Ranks: all, communicates."""
        dist.all_gather(parts, mine, group=self.group)

    def all_reduce(self, buffer: Tensor, op: TransportOp = "sum") -> None:
        """Ranks: all, communicates."""
        dist.all_reduce(buffer, op=_REDUCE[op], group=self.group)

    def broadcast(self, buffer: Tensor) -> None:
        """Ranks: all, communicates."""
        dist.broadcast(buffer, group_src=0, group=self.group)

    def check_own(self, module: nn.Module) -> None:
        """Does nothing: each process has its own."""

    def data_parallel(self, module: nn.Module, **options: Any) -> DistributedDataParallel:
        """Ranks: all, communicates."""
        return DistributedDataParallel(module, process_group=self.group, **options)


def open_default(store: Store, rank: int, size: int, timeout: timedelta) -> None:
    """Opens torch's default group of ranks that have met in the store."""
    backend, apart = "nccl" if has_gpu() else "gloo", PrefixStore("group", store)
    with nullcontext() if has_gpu() else yielding_threads():  # NCCL's stay as they are
        dist.init_process_group(backend, timeout=timeout, store=apart, rank=rank, world_size=size)


def open_gloo(timeout: timedelta) -> GroupTransport:
    """Opens one more group of all ranks, over which tensors on the CPU travel."""
    with yielding_threads():
        group = dist.new_group(backend="gloo", timeout=timeout)
    # A rank has its own connections by now. Were it to leave at once, one that has not could not
    # tell that from a failure.
    dist.barrier(group)
    return GroupTransport(group)


@contextmanager
def yielding_threads() -> Iterator[None]:
    """Threads that are started in the block wait for a core, and push no other thread off one.

    One of gloo's that pushes off another, which holds their lock, asks for it until its time is
    over: ten times as long as a small reduction takes (benchmarks/gloo_threads.py).
    """
    if sys.platform != "linux":
        yield
        return
    chosen = False
    # Where a container forbids it, or does not know it, they work as ever, only slower.
    with suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            chosen = True
    try:
        yield
    finally:
        if chosen:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
