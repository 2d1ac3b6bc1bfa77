"""The only door to other ranks, for everything that is not a gradient.

Every call carries a label. Before any data moves, ranks exchange a small header (verb,
label, call site, shape, step, and whether this rank failed). Ranks that meet in different
calls all get :class:`RankMismatch` with a table of who was where; where a rank failed, all
others get :class:`RemoteError` in the same call. A plain process group would instead hang
or, with equal shapes, silently mix the numbers of two different calls. What is small travels
in the header itself, so that most calls are one exchange.

The exchange runs on a transport of its own (a gloo group), so it never interleaves with gradients.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from dtrain.distributed.activity import Activity, Phase
from dtrain.distributed.transport import Transport, TransportOp
from dtrain.errors import (
    CommError,
    ConfigError,
    DtrainError,
    Failure,
    RankMismatch,
    RemoteError,
)

T = TypeVar("T")
Op = Literal["sum", "mean", "max", "min"]
Rule = Literal["any", "majority", "all"]
Where = str | Callable[[], str]  # where something failed; a function if that is known only then

_REDUCE: dict[Op, TransportOp] = {"sum": "sum", "mean": "sum", "max": "max", "min": "min"}

_HEADER_BYTES = 256  # equal for all calls: ranks that meet in different ones read them all the same
_TOLD = 9  # of these, the digest, and whether this rank failed
_CARRIED_BYTES = _HEADER_BYTES - 16  # and what is carried, aligned for any dtype

# What torch says where the other end of a connection is gone; it has no type for that.
_BROKEN = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset)|Broken pipe")

_SUMMED_BY_GLOO = {
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
}


class Gatherer(Protocol):
    """Serves the gathers of a loss function; see :mod:`dtrain.gathers`."""

    def gather(self, label: str, rows: Tensor) -> Tensor:
        """Returns all ranks' rows."""
        ...


class Comm:
    """Labelled verbs between ranks. It has no rank: what it returns is equal on all of them.

    Every verb must be called by all ranks, in the same order and with the same label.

    Ranks: all, communicates.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        size: int = 1,
        host: str = "localhost",
        transport: Transport | None = None,
        store: Store | None = None,
        activity: Activity | None = None,
    ) -> None:
        self._rank = rank
        self._size = size
        self._host = host
        self._transport = transport
        self._store = store
        self._step = 0
        self._kept: tuple[Tensor, ...] = ()
        self._closed = False
        self._on_main = ""  # the label, while rank 0 runs a function alone
        self._told: BaseException | None = None  # the last error that all ranks know of
        self._gatherer: Gatherer | None = None  # while a loss function runs
        #: Where this rank's main thread is.
        self.activity = activity or Activity()
        #: Held by a thread beside the main one while it uses these verbs; taken by the main
        #: thread, so that all ranks' threads come in the same order.
        self.in_use = threading.Lock()

    def close(self) -> None:
        """Lets go of the transport; the verbs must not be called any more.

        Ranks: all, local.
        """
        self._transport = self._store = None
        self._closed = self._size > 1
        self._kept = ()

    # -- verbs ------------------------------------------------------------------------------

    def all_reduce(self, label: str, tensor: Tensor, op: Op = "sum") -> Tensor:
        """Returns the ``sum``, ``mean``, ``max`` or ``min`` of ``tensor`` over all ranks.

        Args:
            label: names the call; equal on all ranks.
            tensor: any shape, equal on all ranks. It is not changed.
            op: how values of different ranks become one.

        Raises:
            RankMismatch: ranks met in different calls.
            RemoteError: another rank failed.

        Ranks: all, communicates.
        """
        if op not in _REDUCE:
            raise ConfigError(f"all_reduce({label!r}): op={op!r}; choose one of {sorted(_REDUCE)}")
        detail = f"{op} {_describe(tensor)}"
        buffer = tensor.detach().cpu().contiguous()
        everyones = self._meet("all_reduce", label, detail, buffer)
        if self._transport is None:
            buffer = buffer.clone()
        elif everyones is not None:
            buffer = _reduce_here(everyones, op)
        elif tensor.dtype in _SUMMED_BY_GLOO:
            buffer = self._keep(buffer.clone())
            with self._bounded(label):
                self._transport.all_reduce(buffer, _REDUCE[op])
        else:
            buffer = _reduce_here(self._gather_any(label, buffer), op)
        if op == "mean":
            buffer = buffer / self._size
        return buffer.to(tensor.device)

    def all_gather(self, label: str, tensor: Tensor) -> Tensor:
        """Returns every rank's ``tensor``, stacked: shape ``[world size, *tensor.shape]``.

        Raises:
            RankMismatch: ranks met in different calls, or with different shapes.
            RemoteError: another rank failed.

        Ranks: all, communicates.
        """
        detail = _describe(tensor)
        if self._transport is None:
            self._meet("all_gather", label, detail)
            return tensor.detach().clone().unsqueeze(0)
        mine = tensor.detach().cpu().contiguous()
        everyones = self._meet("all_gather", label, detail, mine)
        if everyones is None:
            everyones = self._gather_any(label, mine)
        return everyones.contiguous().to(tensor.device)

    def gather_with_grad(self, label: str, tensor: Tensor) -> Tensor:
        """In a loss function: returns the rows of all ranks, in the order of ranks.

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
            tensor: shape ``[rows, ...]``; all but the rows equal on all ranks. It travels
                through the CPU.

        Returns:
            Shape ``[rows of all ranks, ...]``.

        Raises:
            ConfigError: called outside of a loss function, or first in a later micro-step.
            RankMismatch: ranks gather different things.
            RemoteError: another rank failed.

        Ranks: all whose loss function runs; communicates, and once more in backward.
        """
        if self._gatherer is None:
            raise ConfigError(
                f"gather_with_grad({label!r}) works in loss functions only (and in on_batch and "
                "on_loss): elsewhere use all_gather"
            )
        return self._gatherer.gather(label, tensor)

    def serve_gathers(self, gatherer: Gatherer | None) -> None:
        """Lets :meth:`gather_with_grad` be called, until it is called with None.

        Ranks: all, local.
        """
        self._gatherer = gatherer

    def broadcast(self, label: str, tensor: Tensor) -> Tensor:
        """Returns rank 0's ``tensor`` on every rank; the argument is not changed.

        Raises:
            RankMismatch: ranks met in different calls, or with different shapes.
            RemoteError: another rank failed.

        Ranks: all, communicates.
        """
        self._meet("broadcast", label, _describe(tensor))
        if self._transport is None:
            return tensor.detach().clone()
        buffer = tensor.detach().cpu().clone().contiguous()
        self._send(label, buffer.reshape(-1).view(torch.uint8))  # as bytes: of any dtype
        return buffer.to(tensor.device)

    def barrier(self, label: str) -> None:
        """Returns once every rank has called it with this label.

        Raises:
            RankMismatch: ranks met in different calls.
            RemoteError: another rank failed.

        Ranks: all, communicates.
        """
        self._meet("barrier", label)

    def vote(self, label: str, yes: bool, rule: Rule = "any") -> bool:
        """Returns one answer on all ranks: did ``any``, the ``majority`` or ``all`` say yes?

        ``majority`` means more than half of the ranks.

        Raises:
            RankMismatch: ranks met in different calls.
            RemoteError: another rank failed.

        Ranks: all, communicates.
        """
        rules = {"any": 1, "majority": self._size // 2 + 1, "all": self._size}
        if rule not in rules:
            raise ConfigError(f"vote({label!r}): rule={rule!r}; choose one of {sorted(rules)}")
        votes = self._meet("vote", label, rule, torch.tensor(int(yes)))
        return bool(yes) if votes is None else int(votes.sum()) >= rules[rule]

    def gather_objects(self, label: str, value: T) -> list[T]:
        """Returns every rank's ``value``, by rank. For small things: the values are pickled.

        Raises:
            RankMismatch: ranks met in different calls.
            RemoteError: another rank failed.

        Ranks: all, communicates.
        """
        content = pickle.dumps(value)  # before the ranks meet: it may not be possible
        beginning = _beginning(content)
        everyones = self._meet("gather_objects", label, "", beginning)
        return [value] if everyones is None else self._read(label, content, everyones)

    def on_main(self, label: str, fn: Callable[[], T]) -> T:
        """Rank 0 calls ``fn``; every rank gets its result, or its failure.

        Raises:
            RemoteError: ``fn`` raised on rank 0, where the original error is raised.
            RankMismatch: ranks met in different calls.

        Ranks: all, communicates; ``fn`` runs on rank 0 only.
        """
        self._meet("on_main", label)
        if self._transport is None:
            return fn()
        reply: tuple[Any, Failure | None] = (None, None)
        error: Exception | None = None
        if self._rank == 0:
            self._on_main = label
            before = self.activity.enter(Phase(f"on_main({label!r})", slow=True))
            try:
                reply = (fn(), None)
                content = pickle.dumps(reply)
            except Exception as caught:  # noqa: BLE001 -- told to every rank, then raised again
                error = caught
                reply = (None, self._describe_failure(caught, f"on_main({label!r})"))
                content = pickle.dumps(reply)
            finally:
                self._on_main = ""
                self.activity.enter(before)
            self._send(label, torch.tensor(len(content)))
            self._send(label, torch.frombuffer(bytearray(content), dtype=torch.uint8))
        else:
            length = self._send(label, torch.tensor(0))
            received = self._send(label, torch.empty(int(length), dtype=torch.uint8))
            reply = pickle.loads(received.numpy().tobytes())  # noqa: S301 -- from our own rank 0
        if error is not None:
            self._told = error
            raise error
        if reply[1] is not None:
            raise RemoteError(str(reply[1]))
        result: T = reply[0]
        return result

    # -- failures ---------------------------------------------------------------------------

    @contextmanager
    def lockstep(self, where: Where) -> Iterator[None]:
        """Makes an exception in the block reach every rank in its next call of a verb.

        For phases in which ranks meet only in verbs of this class (evaluation, saving,
        start and end of a run), not for anything that may wait in a gradient reduction.

        Ranks: all, communicates when the block raises.
        """
        try:
            yield
        except (RemoteError, RankMismatch, CommError):
            raise  # every rank knows already
        except Exception as error:
            self.fail(error, where if isinstance(where, str) else where())
            raise

    @contextmanager
    def alone(self, where: Where) -> Iterator[None]:
        """Leaves an exception in the block in the store, for ranks that wait in a reduction.

        For phases in which the others may be anywhere. Once this rank has left, their broken
        collective is explained by what it left behind.

        Ranks: all, local.
        """
        try:
            yield
        except Exception as error:
            # What only follows from another rank's end must not pass for the cause. With a
            # watchdog, fit finds out which of the two it is.
            if not (self.activity.watched and self.may_be_broken(error)):
                self.record(error, where if isinstance(where, str) else where())
            raise

    def fail(self, error: BaseException, where: str) -> None:
        """Tells the other ranks, in the verb that they are in or enter next, that this one failed.

        Ranks: this one, while the others call any verb.
        """
        if self._transport is None or self._is_told(error):
            return
        self.record(error, where)
        try:
            self._headers("fail", where, "", failed=True)
            self._exchange(where, self._describe_failure(error, where))
            self._told = error
            self._forget()
        except (DtrainError, RuntimeError) as broken:
            # The others left first; this rank's own error is raised by the caller and
            # stays the one that counts.
            error.add_note(f"(the other ranks could not be told: {broken})")

    def record(self, error: BaseException, where: str) -> None:
        """Leaves this rank's failure in the store, for ranks that find a broken collective.

        Ranks: all, local.
        """
        if self._store is None or self._is_told(error) or isinstance(error, RemoteError):
            return
        failure = self._describe_failure(error, where)
        try:
            # compare_set: the first writer wins, so the root cause is kept.
            self._store.compare_set("failure", "", json.dumps(asdict(failure)))
        except RuntimeError as unreachable:
            error.add_note(f"(could not be recorded for the other ranks: {unreachable})")

    def may_be_broken(self, error: BaseException) -> bool:
        """Says whether ``error`` may only mean that another rank is gone.

        Ranks: all, local.
        """
        if isinstance(error, DtrainError) or not isinstance(error, RuntimeError):
            return isinstance(error, CommError)
        return self.activity.phase.waits or _BROKEN.search(str(error)) is not None

    def _is_told(self, error: BaseException) -> bool:
        """Says whether all ranks know of ``error``, or of what it was made from."""
        known: BaseException | None = error
        while known is not None:
            if known is self._told or isinstance(known, RemoteError | RankMismatch | CommError):
                return True
            known = known.__cause__
        return False

    def _forget(self) -> None:
        """Removes the record: all ranks know, and a later failure must not be taken for it."""
        if self._store is not None:
            self._store.delete_key("failure")

    def explain(self, error: BaseException) -> DtrainError | None:
        """Returns the recorded failure of another rank, if that is why ``error`` happened.

        Ranks: all, local.
        """
        if self._store is None or isinstance(error, DtrainError):
            return None
        try:
            text = self._store.get("failure") if self._store.check(["failure"]) else b""
        except RuntimeError:
            return None  # the store went away with its host: nothing better than `error` is known
        if not text:
            return None
        failure = Failure(**json.loads(text))
        if failure.rank == self._rank:
            return None
        return RemoteError(str(failure))

    def mark_step(self, step: int) -> None:
        """Says which step this rank is at; ranks that meet at different steps are told.

        Ranks: all, local.
        """
        self._step = step

    def raise_failures(self, label: str, error: Exception | None, where: str) -> None:
        """Raises on all ranks if any has an error: the original where it happened.

        Ranks: all, communicates.
        """
        mine = None if error is None else self._describe_failure(error, where)
        failures = [f for f in self.gather_objects(label, mine) if f is not None]
        if error is not None:
            self._told = error
            raise error
        if failures:
            raise RemoteError("; ".join(str(f) for f in failures))

    def _describe_failure(self, error: BaseException, where: str) -> Failure:
        return Failure.of(error, rank=self._rank, host=self._host, where=where, step=self._step)

    # -- the header -------------------------------------------------------------------------

    def _meet(
        self, verb: str, label: str, detail: str = "", mine: Tensor | None = None
    ) -> Tensor | None:
        """Returns once all ranks have come to this call, with every rank's ``mine``, stacked.

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
        if self._transport is None:
            return None
        site = _call_site()
        carried = mine if mine is not None and mine.nbytes <= _CARRIED_BYTES else None
        headers = self._headers(verb, label, f"{site} {detail}", carried)
        told = headers.numpy()[:, :_TOLD]
        if told[0, -1] or not (told == told[0]).all():
            if told[:, -1].any():
                failures = [f for f in self._exchange(label, None) if f is not None]
                raise RemoteError("; ".join(str(f) for f in failures))
            rows = self._exchange(
                label, f"step {self._step}  {verb}({label!r})  {detail or '-'}  at {site}"
            )
            table = "\n".join(f"  rank {rank}: {row}" for rank, row in enumerate(rows))
            raise RankMismatch(
                "ranks met in different calls; each verb must be called by all ranks in the "
                f"same order:\n{table}"
            )
        if carried is None:
            return None
        content = headers[:, _HEADER_BYTES - _CARRIED_BYTES :][:, : carried.nbytes]
        return content.view(carried.dtype).view(self._size, *carried.shape)

    def _headers(
        self,
        verb: str,
        label: str,
        detail: str,
        carried: Tensor | None = None,
        *,
        failed: bool = False,
    ) -> Tensor:
        """Returns each rank's header, stacked: a digest of its call, whether it failed, and more.

        Shape ``[world size, 256]``, bytes.
        """
        text = f"{verb}\0{label}\0{detail}\0{self._step}"
        digest = hashlib.blake2b(text.encode(), digest_size=_TOLD - 1).digest()
        content = (
            b"" if carried is None else carried.reshape(-1).view(torch.uint8).numpy().tobytes()
        )
        header = (digest + bytes([failed])).ljust(_HEADER_BYTES - _CARRIED_BYTES, b"\0") + content
        padded = bytearray(header.ljust(_HEADER_BYTES, b"\0"))
        return self._gather(label, torch.frombuffer(padded, dtype=torch.uint8))

    def _exchange(self, label: str, value: T) -> list[T]:
        """Gathers objects where all ranks know that all do, and no header is needed."""
        if self._transport is None:
            return [value]
        content = pickle.dumps(value)
        return self._read(label, content, self._gather(label, _beginning(content)))

    def _read(self, label: str, mine: bytes, beginnings: Tensor) -> list[Any]:
        """Returns what every rank pickled; gathers the whole where the beginnings are not it."""
        lengths = beginnings.numpy()[:, :8].copy().view(np.int64)[:, 0]
        if lengths.max() <= _CARRIED_BYTES - 8:
            parts = beginnings[:, 8:]
        else:
            padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
            padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
            parts = self._gather(label, padded)
        return [
            pickle.loads(part[:length].numpy().tobytes())  # noqa: S301 -- from our own ranks
            for part, length in zip(parts, lengths, strict=True)
        ]

    # -- the transport ---------------------------------------------------------------------------

    def _gather(self, label: str, mine: Tensor) -> Tensor:
        """Returns every rank's ``mine``, stacked."""
        everyones = mine.new_empty(self._size, *mine.shape)
        parts = list(everyones.unbind())
        self._keep(mine, *parts)
        assert self._transport is not None
        with self._bounded(label):
            self._transport.all_gather(parts, mine)
        return everyones

    def _gather_any(self, label: str, mine: Tensor) -> Tensor:
        """Gathers as bytes, so that every dtype can travel; stacks what comes."""
        everyones = self._gather(label, mine.reshape(-1).view(torch.uint8))
        return everyones.view(-1).view(mine.dtype).view(self._size, *mine.shape)

    def _send(self, label: str, tensor: Tensor) -> Tensor:
        """Gives every rank rank 0's ``tensor``, in place."""
        self._keep(tensor)
        assert self._transport is not None
        with self._bounded(label):
            self._transport.broadcast(tensor)
        return tensor

    def _keep(self, *tensors: Tensor) -> Tensor:
        """Holds on to the tensors of the call under way until the next call.

        Gloo's own thread lets go of them a little after the call has returned. Were it the
        last to do so, it would need the interpreter's lock, and if the interpreter is ending
        just then, the process aborts.
        """
        self._kept = tensors
        return tensors[0]

    @contextmanager
    def _bounded(self, label: str) -> Iterator[None]:
        """Turns a broken collective into the reason that another rank left for it."""
        here = Phase(f"comm {label!r}", waits=True, slow=self.activity.phase.slow)
        before = self.activity.enter(here)
        try:
            yield
        except RuntimeError as broken:
            reason = self.explain(broken)
            if reason is not None:
                raise reason from broken
            raise CommError(
                f"rank {self._rank} on {self._host} lost the other ranks in {label!r} at step "
                f"{self._step}, and none of them said why (killed, or out of time): {broken}"
            ) from broken
        finally:
            self.activity.enter(before)


def _reduce_here(parts: Tensor, op: Op) -> Tensor:
    """Reduces ``[world size, ...]`` of a dtype that gloo cannot add."""
    if op == "max":
        return parts.amax(0)
    if op == "min":
        return parts.amin(0)
    # Rank by rank, as numbers are added alike on every kind of host; all ranks must get the same.
    wide = parts.float() if parts.dtype in (torch.float16, torch.bfloat16) else parts
    total = wide[0].clone()
    for part in wide[1:]:
        total += part
    return total.to(parts.dtype)


def _beginning(content: bytes) -> Tensor:
    """Returns the length, and as much of the content as travels with a header."""
    room = _CARRIED_BYTES - 8
    words = len(content).to_bytes(8, sys.byteorder) + content[:room].ljust(room, b"\0")
    return torch.frombuffer(bytearray(words), dtype=torch.uint8)


def _describe(tensor: Tensor) -> str:
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"this verb takes a tensor, not {tensor!r}: wrap it in torch.tensor(...)")
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _call_site() -> str:
    """Returns ``file:line`` of the caller, the first frame outside of this module.

    Only the file's name counts: installations may lie in different folders on two hosts.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
