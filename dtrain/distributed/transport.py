"""The transport: how tensors get from rank to rank, beneath ``Comm`` and the strategies.

In a run it is a process group of torch's. Ranks that are threads of one process
(:mod:`dtrain.testing`) bring another one, so that everything above is the same code.
"""

from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
    """Moves tensors between ranks. All ranks must make the same calls in the same order.

    A call that cannot be completed (another rank has left, or does not come in time) raises
    RuntimeError.

    Ranks: all; each method communicates, but for ``check_own``.
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
        """Returns ``module``, wrapped so that backward reduces its parameters' gradients.

        Args:
            module: whose parameters are equal on all ranks.
            options: of DistributedDataParallel.
        """


class GroupTransport:
    """A process group of torch's, as :class:`Transport`.

    Args:
        group: the default group if None, which need not be open yet.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    def all_gather(self, parts: list[Tensor], mine: Tensor) -> None:
        """Ranks: all, communicates."""
        dist.all_gather(parts, mine, group=self._group)

    def all_reduce(self, buffer: Tensor, op: TransportOp = "sum") -> None:
        """Ranks: all, communicates."""
        dist.all_reduce(buffer, op=_REDUCE[op], group=self._group)

    def broadcast(self, buffer: Tensor) -> None:
        """Ranks: all, communicates."""
        dist.broadcast(buffer, group_src=0, group=self._group)

    def check_own(self, module: nn.Module) -> None:
        """Does nothing: each process has its own."""

    def data_parallel(self, module: nn.Module, **options: Any) -> DistributedDataParallel:
        """Ranks: all, communicates."""
        return DistributedDataParallel(module, process_group=self._group, **options)
