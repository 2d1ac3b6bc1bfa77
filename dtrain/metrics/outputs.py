"""Outputs of a whole set: kept on the CPU batch by batch, and brought together from all ranks."""

import io
import pickle
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.distributed import Comm, raw_bytes
from dtrain.errors import LossError

#: What all ranks together send at once, and each of them at least.
_AT_ONCE, _AT_LEAST = 8 * 2**20, 2**14

_FORMS = (
    "outputs are a tensor or array with a row for each sample, a list with one item for each, or a "
    "dict or tuple of these"
)


@dataclass(slots=True)
class Batch:
    """The outputs of a micro-batch."""

    outputs: Any  # rows, or a dict or tuple of them
    samples: int
    rows: list[int] | None  # of the dataset; None of a stream


class Outputs:
    """What a rank has of a set's outputs. Ranks: all, local where a method does not say so."""

    def __init__(self, who: str) -> None:
        self._who = who  # for messages
        self._batches: deque[Batch] = deque()

    def add(self, outputs: Any, samples: int, rows: list[int] | None) -> None:
        """Keeps a copy on the CPU; raises LossError where it is not one output a sample."""
        self._batches.append(Batch(kept(outputs, samples, self._who), samples, rows))

    def gather(self, comm: Comm, *, keeps: bool) -> "list[Batch]":
        """Returns all ranks' batches, in their order, where this rank ``keeps`` them; and forgets.

        Some MB at once, so that no rank needs room for what it does not keep. Ranks: all,
        communicates.
        """
        label = f"{self._who}: outputs"
        world = len(comm.all_gather(label, torch.tensor(0)))
        if world == 1:
            mine, self._batches = [*self._batches], deque()
            return mine
        parts = _parts(self._batches, max(_AT_LEAST, _AT_ONCE // world), self._who)
        streams = [bytearray() for _ in range(world)]
        found: list[list[Batch]] = [[] for _ in range(world)]
        while True:
            part = next(parts, b"")
            sizes = comm.all_gather(label, torch.tensor(len(part))).tolist()
            if not (most := max(sizes)):
                return [*chain.from_iterable(found)]
            sent = torch.frombuffer(bytearray(part.ljust(most, b"\0")), dtype=torch.uint8)
            everyones = comm.all_gather(label, sent)
            for rank, size in enumerate(sizes if keeps else ()):
                streams[rank] += everyones[rank, :size].numpy().data
                found[rank] += _arrived(streams[rank])


def in_order(batches: Iterable[Batch], who: str) -> tuple[list[Batch], list[int] | None]:
    """Returns batches in the dataset's order, and the samples' if that needs to part them.

    Of a stream they are left as they came: rank by rank.
    """
    batches = [one for one in batches if one.samples]
    if any(one.rows is None for one in batches):
        return batches, None
    batches.sort(key=lambda one: (one.rows or [0])[0])
    rows = np.array([row for one in batches for row in one.rows or ()])
    if (rows[1:] >= rows[:-1]).all():
        return batches, None
    for one in batches:
        if len(one.rows or ()) != one.samples:
            raise LossError(
                f"{who}: a batch of {len(one.rows or ())} samples has {one.samples} left, and they "
                "do not come in the dataset's order, so it is not known whose outputs they are: "
                "leave `order` out of Data, or have collate_fn keep all"
            )
    return batches, np.argsort(rows, kind="stable").tolist()


def joined(batches: Sequence[Batch], order: list[int] | None, who: str) -> Any:
    """Returns what a single batch of all samples would have returned, in this order of them."""
    return _joined([one.outputs for one in batches], order, who, "outputs")


def listed(batches: Iterable[Batch], order: list[int] | None = None) -> list[Any]:
    """Returns a list of one output for each sample, in this order of them."""
    found = [_sample(one.outputs, n) for one in batches for n in range(one.samples)]
    return found if order is None else [found[n] for n in order]


def kept(value: Any, samples: int, who: str, name: str = "outputs") -> Any:
    """Returns a copy on the CPU, in which nothing else is kept alive; checked."""
    if isinstance(value, Mapping):
        return {key: kept(one, samples, who, f"{name}[{key!r}]") for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(kept(one, samples, who, f"{name}[{n}]") for n, one in enumerate(value))
    if isinstance(value, list):
        found, what = len(value), f"a list of {len(value)}"
    elif isinstance(value, Tensor | np.ndarray):
        found, what = len(value) if value.ndim else -1, f"of shape {list(value.shape)}"
    else:
        raise LossError(f"{who}: {name} is {type(value).__name__}: {_FORMS}")
    if found != samples:
        each = found // samples if isinstance(value, list) and found % samples == 0 else 0
        hint = f". {each} for each sample go in a list of their own, [[...], ...]" * (each > 1)
        raise LossError(
            f"{who}: {name} is {what}, for a batch of {samples} samples: {_FORMS}{hint}"
        )
    return _copied(value)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_copied(one) for one in value]
    return tuple(map(_copied, value)) if type(value) is tuple else value


def _sample(outputs: Any, number: int) -> Any:
    if isinstance(outputs, dict):
        return {key: _sample(one, number) for key, one in outputs.items()}
    if isinstance(outputs, tuple):
        return tuple(_sample(one, number) for one in outputs)
    return outputs[number]


def _joined(parts: list[Any], order: list[int] | None, who: str, name: str) -> Any:
    first = parts[0]
    forms = {tuple(one) if isinstance(one, dict) else len(one) for one in parts}
    kinds = {type(one).__name__ for one in parts}
    structured = isinstance(first, dict | tuple)
    if len(kinds) > 1 or (structured and len(forms) > 1):
        told = sorted(kinds) if len(kinds) > 1 else sorted(map(str, forms))
        raise LossError(f"{who}: {name} differs from batch to batch: {' and '.join(told)}")
    if isinstance(first, dict):
        of = {key: [one[key] for one in parts] for key in first}
        return {key: _joined(of[key], order, who, f"{name}[{key!r}]") for key in first}
    if isinstance(first, tuple):
        columns = enumerate(zip(*parts, strict=True))
        return tuple(_joined([*one], order, who, f"{name}[{n}]") for n, one in columns)
    if isinstance(first, list):
        items = [*chain.from_iterable(parts)]
        return items if order is None else [items[n] for n in order]
    shapes = {tuple(one.shape[1:]) for one in parts}
    if len(shapes) > 1:
        few = " and ".join(str([*shape]) for shape in sorted(shapes)[:3])
        raise LossError(
            f"{who}: a sample of {name} has another shape in another batch ({few}), as where each "
            "batch is padded to its longest text: return a list with what is each sample's own, "
            "`[row[:n] for row, n in zip(rows, lengths)]`, or pad to one length"
        )
    whole = torch.cat(parts) if isinstance(first, Tensor) else np.concatenate(parts)
    return whole if order is None else whole[order]


# -- on their way ---------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Takes a tensor as its bytes; torch's own way takes the whole of what it is a view of."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.layout != torch.strided or value.is_quantized:
            return NotImplemented
        flat = raw_bytes(value.resolve_conj().resolve_neg())
        return _remade, (flat.numpy(), value.dtype, tuple(value.shape))


def _remade(flat: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not flat.size:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(flat).view(dtype).view(shape)


def _parts(batches: deque[Batch], size: int, who: str) -> Iterator[bytes]:
    """Yields what is sent of ``batches``, ``size`` bytes at once, and lets go of each."""
    waiting = bytearray()
    while batches:
        file = io.BytesIO()
        try:
            _Pickler(file, protocol=5).dump(batches.popleft())
        except Exception as error:
            error.add_note(f"({who}: outputs travel between ranks, so they must be picklable)")
            raise
        waiting += file.tell().to_bytes(8, "little") + file.getbuffer()
        while len(waiting) >= size:
            yield bytes(waiting[:size])
            del waiting[:size]
    if waiting:
        yield bytes(waiting)


def _arrived(stream: bytearray) -> Iterator[Batch]:
    """Yields the batches that are whole by now, and takes them out of what has come."""
    while len(stream) >= 8:
        end = 8 + int.from_bytes(stream[:8], "little")
        if len(stream) < end:
            return
        batch: Batch = pickle.loads(stream[8:end])  # noqa: S301 -- from our own ranks
        del stream[:end]
        yield batch
