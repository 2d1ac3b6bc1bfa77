"""Exchanges between ranks in which none waits in vain: a header first, then what it announces.

The header tells what call a rank is in (verb, label, call site, shape, step), as a digest, and
whether it failed. A plain process group would hang where ranks met in different calls or, with
equal shapes, silently mix their numbers.
"""

import contextlib
import hashlib
import json
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from dtrain import accelerator
from dtrain.distributed.activity import Activity, Phase
from dtrain.distributed.transport import Transport, TransportOp
from dtrain.errors import CommError, DtrainError, Failure, RankMismatch, RemoteError, locate

_HEADER_BYTES = 256  # equal for all calls: ranks that meet in different ones read them all the same
_TOLD = 9  # of these, the digest, and whether this rank failed
_CARRIED_BYTES = _HEADER_BYTES - 16  # what is small travels along, aligned for any dtype
_SHARED_BYTES = 1024  # so much of what rank 0 has comes at once

# dtrain's files, and one by which some of its functions are called.
_OWN = (os.path.dirname(os.path.dirname(__file__)) + os.sep, contextlib.__file__)

_FLOATS = {torch.float16, torch.float32, torch.float64}
_SUMMED_BY_GLOO = _FLOATS | {torch.int8, torch.uint8, torch.int32, torch.int64}


@dataclass(eq=False)
class Failures:
    """This rank's failures, and the record of the first in the store, where the others find it."""

    rank: int
    host: str
    store: Store | None
    step: int = 0  # the global step that this rank is at
    #: What the last error that all ranks know of bears. Not that itself: by its frames it would
    #: hold the model.
    _told: object = field(default_factory=object)

    def describe(self, error: BaseException, where: str) -> Failure:
        """Says in words that can be sent what went wrong on this rank."""
        kind = type(error).__name__
        message = " ".join([str(error), *getattr(error, "__notes__", ())])
        # Where it is told of again later, the first time counts.
        step: int = vars(error).setdefault("_dtrain_step", self.step)
        return Failure(self.rank, self.host, where, step, kind, message, locate(error))

    def note_told(self, error: BaseException) -> None:
        """Notes that all ranks know of ``error``."""
        self._told = vars(error)["_dtrain_told"] = object()

    def is_told(self, error: BaseException) -> bool:
        """Says whether all ranks know of ``error``, or of what it was made from."""
        known: BaseException | None = error
        while known is not None:
            if isinstance(known, RemoteError | RankMismatch | CommError):
                return True
            if vars(known).get("_dtrain_told") is self._told:
                return True
            known = known.__cause__
        return False

    def record(self, error: BaseException, where: str) -> None:
        """Leaves this rank's failure for ranks that find a broken collective, unless all know."""
        if self.store is None or self.is_told(error):
            return
        text = json.dumps(asdict(self.describe(error, where)))
        try:
            # compare_set: the first writer wins, so the root cause is kept.
            self.store.compare_set("failure", "", text)
        except RuntimeError as unreachable:
            error.add_note(f"(could not be recorded for the other ranks: {unreachable})")

    def is_recorded(self) -> bool:
        """Says whether another rank has left a record: it waits to tell, or has left."""
        try:
            found = self.store is not None and self.store.check(["failure"])
            text = self.store.get("failure") if self.store is not None and found else b""
        except RuntimeError:
            return False  # as below
        return bool(text) and json.loads(text)["rank"] != self.rank

    def forget(self) -> None:
        """Removes the record: all ranks know, and a later failure must not be taken for it."""
        if self.store is not None:
            self.store.delete_key("failure")

    def explain(self, error: BaseException) -> DtrainError | None:
        """Returns another rank's recorded failure, if that is why ``error`` happened."""
        if self.store is None or isinstance(error, DtrainError):
            return None
        if accelerator.is_this_ranks(error):
            return None
        try:
            text = self.store.get("failure") if self.store.check(["failure"]) else b""
        except RuntimeError:
            return None  # the store went away with its host: nothing better than `error` is known
        failure = Failure(**json.loads(text)) if text else None
        return None if failure is None or failure.rank == self.rank else RemoteError(str(failure))


@dataclass(eq=False)
class Exchange:
    """What all ranks do together over a transport; ``activity`` is told in which verb they wait.

    A call that breaks raises the reason that another rank left for it, or :class:`CommError`.
    """

    size: int
    transport: Transport
    failures: Failures
    activity: Activity
    _kept: tuple[Tensor, ...] = ()

    def meet(
        self, verb: str, label: str, detail: str, site: str, mine: Tensor | None
    ) -> Tensor | None:
        """See :meth:`Comm._meet`."""
        carried = mine if mine is not None and mine.nbytes <= _CARRIED_BYTES else None
        headers = self._headers(verb, label, f"{site} {detail}", carried)
        heads = headers.numpy()[:, :_TOLD]
        if heads[0, -1] or not (heads == heads[0]).all():
            if heads[:, -1].any():
                told = remote_error(self.gather_objects(label, None))
                vars(told)["_dtrain_left"] = True
                try:
                    raise told
                finally:
                    del told  # its traceback has this frame
            row = f"step {self.failures.step}  {verb}({label!r})  {detail or '-'}  at {site}"
            row += _asked_for()
            rows = enumerate(self.gather_objects(label, row))
            table = "\n".join(f"  rank {rank}: {row}" for rank, row in rows)
            raise RankMismatch(
                "ranks met in different calls; each verb must be called by all ranks in the "
                f"same order:\n{table}"
            )
        if carried is None:
            return None
        content = headers[:, _HEADER_BYTES - _CARRIED_BYTES :][:, : carried.nbytes]
        return content.view(carried.dtype).view(self.size, *carried.shape)

    def tell(self, failure: Failure) -> None:
        """Makes every other rank raise ``failure`` in the verb that it is in or enters next."""
        self._headers("fail", failure.where, "", None, failed=True)
        self.gather_objects(failure.where, failure)

    def _headers(
        self, verb: str, label: str, detail: str, carried: Tensor | None, *, failed: bool = False
    ) -> Tensor:
        """Returns each rank's header, stacked: shape ``[world size, 256]``, bytes."""
        text = f"{verb}\0{label}\0{detail}\0{self.failures.step}"
        digest = hashlib.blake2b(text.encode(), digest_size=_TOLD - 1).digest()
        header = (digest + bytes([failed])).ljust(_HEADER_BYTES - _CARRIED_BYTES, b"\0")
        if carried is not None:
            header += raw_bytes(carried).numpy().tobytes()
        padded = bytearray(header.ljust(_HEADER_BYTES, b"\0"))
        return self.gather(label, torch.frombuffer(padded, dtype=torch.uint8), call="verb")

    def gather_objects(self, label: str, value: Any) -> list[Any]:
        """Returns every rank's ``value``, by rank."""
        content = pickle.dumps(value)
        return self.unpickle(label, content, self.gather(label, beginning(content)))

    def unpickle(self, label: str, mine: bytes, beginnings: Tensor) -> list[Any]:
        """Returns what every rank pickled; gathers the whole where the beginnings are not it."""
        lengths = beginnings.numpy()[:, :8].copy().view(np.int64)[:, 0]
        if lengths.max() <= _CARRIED_BYTES - 8:
            parts = beginnings[:, 8:]
        else:
            padded = bytearray(mine.ljust(lengths.max(), b"\0"))
            parts = self.gather(label, torch.frombuffer(padded, dtype=torch.uint8))
        return [
            pickle.loads(part[:length].numpy().tobytes())  # noqa: S301 -- from our own ranks
            for part, length in zip(parts, lengths, strict=True)
        ]

    def share(self, label: str, content: bytes = b"") -> Any:
        """Returns what rank 0 has pickled; the others give nothing."""
        told = self.broadcast(label, beginning(content, _SHARED_BYTES)).numpy().tobytes()
        length, came = int.from_bytes(told[:8], sys.byteorder), told[8:]
        if length > len(came):
            rest = bytearray(content[len(came) :].ljust(length - len(came), b"\0"))
            came += (
                self.broadcast(label, torch.frombuffer(rest, dtype=torch.uint8)).numpy().tobytes()
            )
        return pickle.loads(came[:length])  # noqa: S301 -- our own

    def gather(self, label: str, mine: Tensor, call: str = "") -> Tensor:
        """Returns every rank's ``mine``, stacked; a header's is a ``call`` of all ranks."""
        everyones = mine.new_empty(self.size, *mine.shape)
        parts = list(everyones.unbind())
        with self._under_way(label, mine, *parts, call=call):
            self.transport.all_gather(parts, mine)
        return everyones

    def gather_any(self, label: str, mine: Tensor) -> Tensor:
        """Gathers as bytes, so that every dtype can travel; stacks what comes."""
        everyones = self.gather(label, raw_bytes(mine))
        return everyones.view(-1).view(mine.dtype).view(self.size, *mine.shape)

    def all_reduce(self, label: str, mine: Tensor, op: TransportOp) -> Tensor:
        """Returns all ranks' ``mine``, reduced."""
        if mine.dtype not in _SUMMED_BY_GLOO:
            return reduce_here(self.gather_any(label, mine), op)
        buffer = mine.clone()
        with self._under_way(label, buffer):
            self.transport.all_reduce(buffer, op)
        return buffer

    def broadcast(self, label: str, buffer: Tensor) -> Tensor:
        """Gives every rank rank 0's ``buffer``, in place."""
        with self._under_way(label, buffer):
            self.transport.broadcast(buffer)
        return buffer

    @contextmanager
    def _under_way(self, label: str, *tensors: Tensor, call: str = "") -> Iterator[None]:
        """Turns a broken collective into the reason that another rank left for it."""
        # Held until the next call: gloo's own thread lets go of them a little after the call has
        # returned. Were it the last to do so, it would need the interpreter's lock, and if the
        # interpreter is ending just then, the process aborts.
        self._kept = tensors
        before = self.activity.phase
        self.activity.enter(Phase(f"comm {label!r}", waits=True, slow=before.slow, call=call))
        try:
            yield
        except RuntimeError as broken:
            rank, host, step = self.failures.rank, self.failures.host, self.failures.step
            raise self.failures.explain(broken) or CommError(
                f"rank {rank} on {host} lost the other ranks in {label!r} at step {step}, and none "
                f"of them said why (killed, or out of time): {broken}"
            ) from broken
        finally:
            self.activity.enter(before)


def beginning(content: bytes, size: int = _CARRIED_BYTES) -> Tensor:
    """Returns the length, and as much of the content as has room: as travels with a header."""
    room = size - 8
    told = len(content).to_bytes(8, sys.byteorder) + content[:room].ljust(room, b"\0")
    return torch.frombuffer(bytearray(told), dtype=torch.uint8)


def reduce_here(parts: Tensor, op: TransportOp) -> Tensor:
    """Reduces ``[world size, ...]`` by itself: what came with the header, or gloo cannot add."""
    if op != "sum":
        return parts.amax(0) if op == "max" else parts.amin(0)
    # Rank by rank, as numbers are added alike on every kind of host; all ranks must get the same.
    wide = parts.float() if parts.dtype in (torch.float16, torch.bfloat16) else parts
    total = wide[0].clone()
    for part in wide[1:]:
        total += part
    return total.to(parts.dtype)


def remote_error(failures: list[Failure | None]) -> RemoteError:
    """Returns an error that names all ranks that failed."""
    return RemoteError("; ".join(str(failure) for failure in failures if failure is not None))


def _asked_for() -> str:
    """Returns which of dtrain's functions the script has called, and where; "" for a verb."""
    frame, name = sys._getframe(2), ""
    verbs = frame.f_code.co_filename
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        if frame.f_code.co_filename not in (verbs, _OWN[1]):
            name = frame.f_code.co_name
        frame = frame.f_back
    where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
    return f", for {name} at {where}" if name else ""


def raw_bytes(tensor: Tensor) -> Tensor:
    """Returns a dense tensor's memory as bytes, flat; that of a copy, if it is not contiguous."""
    flat = tensor.contiguous().reshape(-1)
    if flat.stride() != (1,):  # of a single number, torch takes any stride for contiguous
        flat = flat.as_strided(flat.shape, (1,))
    return flat.view(torch.uint8)


def digest_of(value: object) -> str:
    """Returns a short digest of JSON values, to compare them between ranks and runs."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
