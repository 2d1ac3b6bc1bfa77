"""The only door to other ranks, for everything that is not a gradient: verbs with labels."""

import os
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from dtrain import accelerator
from dtrain.distributed.activity import Activity, Phase
from dtrain.distributed.exchange import (
    Exchange,
    Failures,
    beginning,
    raw_bytes,
    reduce_here,
    remote_error,
)
from dtrain.distributed.transport import Transport
from dtrain.errors import CommError, ConfigError, DtrainError, RankMismatch, RemoteError

T = TypeVar("T")
Op = Literal["sum", "mean", "max", "min"]
Rule = Literal["any", "majority", "all"]
Where = str | Callable[[], str]  # where something failed; a function if that is known only then

# What torch says where the other end of a connection is gone; it has no type for that.
_BROKEN = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset)|Broken pipe")

_LOOK_EVERY_S = 2.0


class _Gatherer(Protocol):  # of :mod:`dtrain.step`
    def gather(self, label: str, rows: Tensor) -> Tensor: ...


class Comm:
    """Labelled verbs between ranks. It has no rank: what it returns is equal on all of them.

    Every verb must be called by all ranks, in the same order and with the same label. Verbs have a
    transport of their own (a gloo group), so they never interleave with gradients.

    Raises:
        RankMismatch: by every verb, where ranks met in different calls, or with different shapes.
        RemoteError: by every verb, where another rank failed.
        CommError: by every verb, where a rank is gone and left no reason.

    Ranks: all; communicates where a method does not say that it is local.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        size: int = 1,
        host: str = "localhost",
        transport: Transport | None = None,
        store: Store | None = None,
    ) -> None:
        self._rank = rank
        self._size = size
        self._closed = False
        self._next_look = 0.0
        self._on_main = ""  # the label, while rank 0 runs a function alone
        self._gatherer: _Gatherer | None = None  # while a loss function runs
        self.activity = Activity()  # where this rank's main thread is
        # Held by a thread beside the main one while it uses these verbs; taken by the main
        # thread, so that all ranks' threads come in the same order.
        self.in_use = threading.Lock()
        self._failures = failures = Failures(rank, host, store)
        self.record, self.explain = failures.record, failures.explain
        self.is_told = failures.is_told
        self._exchange: Exchange | None = None  # with nobody, in a world of one
        if transport is not None:
            self._exchange = Exchange(size, transport, failures, self.activity)

    def close(self) -> None:
        """Lets go of transport and store: no verb may be called any more. Ranks: all, local."""
        self._exchange = None
        self._failures.store = None
        self._closed = self._size > 1

    def all_reduce(self, label: str, tensor: Tensor, op: Op = "sum") -> Tensor:
        """Returns the ``sum``, ``mean``, ``max`` or ``min`` of ``tensor`` over all ranks.

        Args:
            label: names the call; equal on all ranks.
            tensor: any shape, equal on all ranks. It is not changed.
            op: how values of different ranks become one. NaN on any rank stays NaN.
        """
        if op not in get_args(Op):
            raise ConfigError(
                f"all_reduce({label!r}): op={op!r}; choose one of {sorted(get_args(Op))}"
            )
        detail = f"{op} {_describe(tensor)}"
        mine = tensor.detach().cpu().contiguous()
        everyones = self._meet("all_reduce", label, detail, mine)
        summed = "sum" if op == "mean" else op
        if self._exchange is None:
            reduced = mine.clone()
        elif everyones is not None:
            reduced = reduce_here(everyones, summed)
        else:
            reduced = self._exchange.all_reduce(label, mine, summed)
            if summed != "sum" and mine.is_floating_point():
                # NaN wins, as it does where all is here; gloo's answer hangs on the ranks' order.
                found = self._exchange.all_reduce(label, mine.isnan().to(torch.uint8), "max")
                reduced.masked_fill_(found.bool(), float("nan"))
        return (reduced / self._size if op == "mean" else reduced).to(tensor.device)

    def all_gather(self, label: str, tensor: Tensor) -> Tensor:
        """Returns every rank's ``tensor``, stacked: shape ``[world size, *tensor.shape]``."""
        detail = _describe(tensor)
        if self._exchange is None:
            self._meet("all_gather", label, detail)
            return tensor.detach().clone().unsqueeze(0)
        mine = tensor.detach().cpu().contiguous()
        everyones = self._meet("all_gather", label, detail, mine)
        if everyones is None:
            everyones = self._exchange.gather_any(label, mine)
        return everyones.contiguous().to(tensor.device)

    def gather_with_grad(self, label: str, tensor: Tensor) -> Tensor:
        """In a loss function: returns all ranks' rows, shape ``[rows of all ranks, ...]``.

        A rank that skips, has no data or fails takes part with no rows, so nobody waits for it.
        Ranks may have different numbers of rows.

        Backward: the gradient of a row is the sum, over all ranks, of what their losses say
        about it. With each rank's loss taken over its own rows against all, that makes the
        gradient of the global batch's loss (dtrain weighs and sums the ranks' losses).

        Example::

            def loss_fn(model, batch, ctx):
                left, right = model(batch)              # shape [rows, features] each
                rights = ctx.comm.gather_with_grad("right", right)
                return (left @ rights.T).logsumexp(-1).mean()

        Args:
            label: names the call; equal on all ranks.
            tensor: shape ``[rows, ...]``, equal but for the rows. It travels through the CPU.

        Raises:
            ConfigError: called outside of a loss function, or first in a later micro-step.

        Ranks: all whose loss function runs; communicates, and once more in backward.
        """
        if self._gatherer is None:
            raise ConfigError(
                f"gather_with_grad({label!r}) works in loss functions only (and in on_batch and "
                "on_loss): elsewhere use all_gather"
            )
        return self._gatherer.gather(label, tensor)

    def serve_gathers(self, gatherer: _Gatherer | None) -> None:
        """Lets :meth:`gather_with_grad` be called, until this is given None. Ranks: all, local."""
        self._gatherer = gatherer

    def broadcast(self, label: str, tensor: Tensor) -> Tensor:
        """Returns rank 0's ``tensor`` on every rank; the argument is not changed."""
        self._meet("broadcast", label, _describe(tensor))
        if self._exchange is None:
            return tensor.detach().clone()
        buffer = tensor.detach().cpu().clone().contiguous()
        self._exchange.broadcast(label, raw_bytes(buffer))  # of any dtype
        return buffer.to(tensor.device)

    def barrier(self, label: str) -> None:
        """Returns once every rank has called it with this label."""
        self._meet("barrier", label)

    def vote(self, label: str, yes: bool, rule: Rule = "any") -> bool:
        """Returns one answer: did ``any``, the ``majority`` (over half) or ``all`` say yes?"""
        rules = {"any": 1, "majority": self._size // 2 + 1, "all": self._size}
        if rule not in rules:
            raise ConfigError(f"vote({label!r}): rule={rule!r}; choose one of {sorted(rules)}")
        votes = self._meet("vote", label, rule, torch.tensor(int(yes)))
        return bool(yes) if votes is None else int(votes.sum()) >= rules[rule]

    def gather_objects(self, label: str, value: T) -> list[T]:
        """Returns every rank's ``value``, by rank. For small things: the values are pickled."""
        content = pickle.dumps(value)  # before the ranks meet: it may not be possible
        everyones = self._meet("gather_objects", label, "", beginning(content))
        if self._exchange is None or everyones is None:
            return [value]
        return self._exchange.unpickle(label, content, everyones)

    def on_main(self, label: str, fn: Callable[[], T]) -> T:
        """Rank 0 calls ``fn``; every rank gets its result, or its failure.

        Raises:
            RemoteError: ``fn`` raised on rank 0, where the original error is raised.

        Ranks: all, communicates; ``fn`` runs on rank 0 only.
        """
        self._meet("on_main", label)
        if self._exchange is None:
            return fn()
        result: T
        if self._rank != 0:
            result, failure = self._exchange.share(label)
            if failure is not None:
                raise RemoteError(str(failure))
            return result
        self._on_main = label
        before = self.activity.enter(Phase(f"on_main({label!r})", slow=True))
        try:
            result = fn()
            content = pickle.dumps((result, None))
        except Exception as error:
            failure = self._failures.describe(error, f"on_main({label!r})")
            self._exchange.share(label, pickle.dumps((None, failure)))
            self._failures.note_told(error)
            raise
        finally:
            self._on_main = ""
            self.activity.enter(before)
        self._exchange.share(label, content)
        return result

    @contextmanager
    def lockstep(self, where: Where) -> Iterator[None]:
        """Makes an exception in the block reach every rank in its next call of a verb.

        Only where no rank may wait in a gradient reduction; communicates when the block raises.
        """
        try:
            yield
        except (RemoteError, RankMismatch, CommError):
            raise  # every rank knows already
        except Exception as error:
            accelerator.give_up(error)
            self.fail(error, where if isinstance(where, str) else where())
            raise

    def look_for_failures(self) -> None:
        """Raises what another rank that waits to tell of it has failed with.

        For where ranks meet in no verb for long. Ranks: all, local, until there is a failure.
        """
        if (now := monotonic()) >= self._next_look:
            self._next_look = now + _LOOK_EVERY_S
            if self._failures.is_recorded():
                self.barrier("a failure on another rank")

    def leave(self, error: Exception, where: str) -> None:
        """Leaves an exception in the store, for ranks that wait in a reduction.

        Once this rank has left, that explains their broken collective. Ranks: this one, local.
        """
        # What only follows from another rank's end must not pass for the cause. With a watchdog,
        # fit finds out which of the two it is.
        if not (self.activity.watched and self.may_be_broken(error)):
            self.record(error, where)

    def fail(self, error: BaseException, where: str) -> None:
        """Tells the other ranks, in the verb that they are in or enter next, that this one failed.

        Ranks: this one, while the others call any verb.
        """
        failures = self._failures
        if self._exchange is None or failures.is_told(error):
            return
        failures.record(error, where)
        try:
            self._exchange.tell(failures.describe(error, where))
            failures.note_told(error)
            failures.forget()
        except (DtrainError, RuntimeError) as broken:
            # The others left first; this rank's own error, which the caller raises, counts.
            error.add_note(f"(the other ranks could not be told: {broken})")

    def raise_failures(self, label: str, error: Exception | None, where: str) -> None:
        """Raises on all ranks if any has an error: the original where it happened."""
        mine = None if error is None else self._failures.describe(error, where)
        everyones = self.gather_objects(label, mine)
        if error is not None:
            self._failures.note_told(error)
            self._failures.forget()
            try:
                raise error
            finally:
                del error  # its traceback has this frame
        if any(everyones):
            raise remote_error(everyones)

    def may_be_broken(self, error: BaseException) -> bool:
        """Says whether ``error`` may only mean that another rank is gone. Ranks: all, local."""
        if accelerator.is_this_ranks(error):
            return False
        if isinstance(error, DtrainError) or not isinstance(error, RuntimeError):
            return isinstance(error, CommError)
        if self.is_told(error):  # all ranks have heard of it as this one's
            return False
        return self.activity.phase.waits or _BROKEN.search(str(error)) is not None

    def has_left(self, error: BaseException) -> bool:
        """Says whether ``error`` is that of a rank that told it in a verb, and left the training.

        Ranks: all, local.
        """
        return "_dtrain_left" in vars(error)

    def mark_step(self, step: int) -> None:
        """Says which step this rank is at, to compare where ranks meet. Ranks: all, local."""
        self._failures.step = step

    def _meet(
        self, verb: str, label: str, detail: str = "", mine: Tensor | None = None
    ) -> Tensor | None:
        """Returns every rank's ``mine``, stacked, once all ranks have come to this call.

        None where there is none, it is too large to travel in the header, or this rank is alone.
        """
        if not isinstance(label, str) or not label:
            raise ConfigError(f"{verb}: the first argument is a label (text), got {label!r}")
        if self._closed:
            raise CommError(f"{verb}({label!r}): the world was closed")
        if self._on_main:
            raise ConfigError(
                f"{verb}({label!r}) inside of on_main({self._on_main!r}): that runs on rank 0 "
                "only, and the other ranks would never come. Call it outside, on all ranks."
            )
        if self._exchange is None:
            return None
        return self._exchange.meet(verb, label, detail, _call_site(), mine)


def _describe(tensor: Tensor) -> str:
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"this verb takes a tensor, not {tensor!r}: wrap it in torch.tensor(...)")
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _call_site() -> str:
    """Returns ``file:line`` of the caller, the first frame outside of this module."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    # Only the file's name: installations may lie in different folders on two hosts.
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
