"""Rows of all ranks inside of a loss function, though some ranks may have no batch.

A loss function that compares its samples with those of all ranks (in-batch negatives) waits
for every rank, while one that skips, fails or has run out of data never calls it. So ranks
meet once more at the end of each micro-step; whoever is there already takes part in the
others' gathers with no rows, forward and backward. In runs that do not gather, all know so after
their first micro-step, and meet no more.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dtrain.distributed import Comm
from dtrain.errors import ConfigError, LossError, RankMismatch


@dataclass(frozen=True, slots=True)
class Rows:
    """A rank gathers."""

    label: str  # of the call
    rows: Tensor  # what it contributes, shape [rows, ...], on the CPU
    enabled: bool  # whether it records gradients at all
    wants_grad: bool  # whether its rows need one

    def __str__(self) -> str:
        dtype = str(self.rows.dtype).removeprefix("torch.")
        shape = ", ".join(map(str, ["rows", *self.rows.shape[1:]]))
        mode = "" if self.enabled else " under no_grad"
        return f"gather_with_grad({self.label!r}) of {dtype}[{shape}]{mode}"


@dataclass(frozen=True, slots=True)
class Done:
    """A rank has come to the end of its micro-step."""

    weight: float  # units in its micro-batch; 0 where it had none, or left it out
    gathered: int  # how often its loss function gathered
    completed: bool  # its loss function ran to its end: it is known by now whether it gathers
    ended: bool  # it has no more batches


@dataclass
class Gathers:
    """One rank's end of the gathers of a loss function."""

    comm: Comm
    rank: int
    size: int
    refused: str = ""  # why loss functions cannot gather, if so
    _used: bool | None = None  # whether loss functions gather; None until all ranks know
    _calls: int = 0
    _ties: list[Tensor] = field(default_factory=list)
    #: What ties are made of, by which backward comes only if it is to reach these: those of the
    #: ties that were taken last.
    anchors: list[Tensor] = field(default_factory=list)
    _anchors: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets whether loss functions gather; must be called on all ranks."""
        self._used = False if self.refused else None

    def gather(self, label: str, rows: Tensor) -> Tensor:
        """Returns all ranks' rows; see :meth:`dtrain.Comm.gather_with_grad`.

        Ranks: all, communicates; ranks without a batch take part in :meth:`finish`.
        """
        if not isinstance(rows, Tensor) or not rows.dim():
            raise LossError(
                f"gather_with_grad({label!r}) takes rows, a tensor of shape [rows, ...], "
                f"not {rows!r}"
            )
        if self.size == 1:
            return rows
        if self.refused:
            raise ConfigError(self.refused)
        if self._used is False:
            raise ConfigError(
                f"gather_with_grad({label!r}) is called for the first time in a later micro-step: "
                "ranks without a batch no longer wait for it. Call it from the first one on."
            )
        self._calls += 1
        enabled = torch.is_grad_enabled()
        mine = rows.detach().cpu().clone(memory_format=torch.contiguous_format)
        everyones = self._announce(Rows(label, mine, enabled, enabled and rows.requires_grad))
        _check(everyones)
        return self._join(everyones, rows)

    def finish(
        self, weight: float = 0.0, *, completed: bool = False, ended: bool = False
    ) -> list[Done]:
        """Ends a micro-step: serves the others' gathers until all ranks are here.

        Takes what :class:`Done` holds, and returns each rank's, by rank.

        Ranks: all, communicates; local, and returns nothing, once all know that none gathers.
        """
        if self._used is False or self.size == 1:
            return []
        while True:
            everyones = self._announce(Done(weight, self._calls, completed, ended))
            done = [one for one in everyones if isinstance(one, Done)]
            if len(done) == self.size:
                break
            try:
                first = _check(everyones)
            except RankMismatch:
                continue  # raised where it was called; those ranks come here next
            nothing = first.rows.new_zeros((0, *first.rows.shape[1:]))
            with torch.set_grad_enabled(first.enabled):
                self._join(everyones, nothing)
        self._calls = 0
        if self._used is None and any(one.completed or one.gathered for one in done):
            self._used = any(one.gathered for one in done)
        return done

    def take_ties(self) -> list[Tensor]:
        """Returns zeros, one for each gather; their backward takes part in that of the others."""
        ties, self._ties = self._ties, []
        self.anchors, self._anchors = self._anchors, []
        return ties

    def _announce(self, mine: Rows | Done) -> list[Rows | Done]:
        everyones: list[Rows | Done] = self.comm.gather_objects("gathers of a loss function", mine)
        return everyones

    def _join(self, everyones: list[Rows | Done], mine: Tensor) -> Tensor:
        gathering = [one for one in everyones if isinstance(one, Rows)]
        whole = torch.cat([one.rows for one in gathering]).to(mine.device)
        if not any(one.wants_grad for one in gathering):
            return whole
        start = sum(len(one.rows) for one in everyones[: self.rank] if isinstance(one, Rows))
        # Rows may need no gradient on this rank; it takes part in the others' backward anyway.
        anchor = torch.zeros((), device=mine.device, requires_grad=True)
        gathered: Tensor
        gathered, tie = _Join.apply(  # type: ignore[no-untyped-call]
            mine, anchor, whole, self.comm, gathering[0].label, slice(start, start + len(mine))
        )
        self._ties.append(tie)
        self._anchors.append(anchor)
        return gathered


def _check(everyones: list[Rows | Done]) -> Rows:
    """Returns what is gathered, by the first who does; raises RankMismatch where others differ."""
    first = next(one for one in everyones if isinstance(one, Rows))
    if any(isinstance(one, Rows) and str(one) != str(first) for one in everyones):
        table = "\n".join(
            f"  rank {rank}: {one if isinstance(one, Rows) else 'no batch, or done with it'}"
            for rank, one in enumerate(everyones)
        )
        raise RankMismatch(f"ranks met in different gathers of their loss functions:\n{table}")
    return first


class _Join(torch.autograd.Function):
    """All ranks' rows; backward sums what each rank's loss says about them.

    The second output is a zero that goes into every rank's loss, so that its backward is
    called whatever becomes of the rows.
    """

    @staticmethod
    def forward(
        ctx: Any, mine: Tensor, anchor: Tensor, whole: Tensor, comm: Comm, label: str, own: slice
    ) -> tuple[Tensor, Tensor]:
        ctx.comm, ctx.label, ctx.own = comm, label, own
        return whole, anchor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        # Sums of half precision would lose or overflow.
        summed = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
        total = ctx.comm.all_reduce(f"gradient of gather_with_grad({ctx.label!r})", summed)
        return total[ctx.own].to(grad.dtype), grads[1].new_zeros(()), None, None, None, None
