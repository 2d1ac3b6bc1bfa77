"""Many tensors as one copy: packed in pinned memory, which goes round."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import dlpack

from dtrain.accelerator import Accelerator

_ALIGNMENT = 512  # bytes: CUDA's own memory begins at multiples of it
_TURNS = 2  # one is filled while the other's copy is on its way
_REMEMBERED = 64  # layouts
#: Bytes of a batch from which on its copy runs beside what is computed. A copy of fewer takes the
#: device less time than the host would take for another stream, for events between the two, and for
#: memory that is of both: ten calls, for each of which a GPU computes a layer of a small model.
_BESIDE = 2**20

Kind = tuple[torch.dtype, Sequence[int], Sequence[int]]  # with shape and strides
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Layout:
    """Where tensors lie in one memory."""

    def __init__(self, kinds: Iterable[Kind]) -> None:
        self._places: list[tuple[torch.dtype, int, Sequence[int], Sequence[int]]] = []
        self._begins: list[int] = []
        self.bytes = 0
        for dtype, shape, strides in kinds:
            self._places.append((dtype, self.bytes // dtype.itemsize, shape, strides))
            self._begins.append(self.bytes)
            self.bytes += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def tensors(self, memory: Tensor) -> list[Tensor]:
        """Returns the tensors that lie there; no views, which autograd takes for parts of one."""
        storage, device = memory.untyped_storage(), memory.device
        return [
            torch.empty(0, dtype=dtype, device=device).set_(storage, begin, shape, strides)
            for dtype, begin, shape, strides in self._places
        ]

    def rows(self, memory: Tensor) -> list[Bytes]:
        """Returns the bytes of tensors there that are contiguous, by their first dimension."""
        whole: Bytes = memory.numpy()
        found = []
        for (dtype, _, shape, _), begin in zip(self._places, self._begins, strict=True):
            end = begin + prod(shape) * dtype.itemsize
            found.append(whole[begin:end].reshape(shape[0] if shape else 1, -1))
        return found


def _apart(tensor: Tensor) -> Tensor:
    """Returns the same memory as a tensor with a storage of its own, which keeps it alive.

    A compiled function may not change one in place that shares its storage with another.
    """
    try:
        return dlpack.from_dlpack(dlpack.to_dlpack(tensor))  # type: ignore[attr-defined]
    except (BufferError, RuntimeError):
        return tensor  # of a dtype that only torch knows


@lru_cache(_REMEMBERED)
def layout_of(kinds: tuple[Kind, ...]) -> Layout:
    """Returns where tensors of these kinds lie."""
    return Layout(kinds)


def kind_of(tensor: Tensor) -> Kind:
    """Returns what a copy of it is like, without the gaps that it may have."""
    dense = tensor if tensor.is_contiguous() else tensor.to("meta")
    return tensor.dtype, tensor.shape, dense.stride()


class _Packed(NamedTuple):
    memory: Tensor
    tensors: list[Tensor]
    rows: list[list[Bytes]]  # one list, once somebody has asked


@dataclass
class _Turn:
    """A pinned buffer, what lies where in it, and when its last copy is done."""

    event: Any
    buffer: Tensor | None = None
    packed: dict[Layout, _Packed] = field(default_factory=dict)


class Ring:
    """Sends tensors to the device, and the host does not wait: many beside what is computed.

    After a first lap nothing is made anew, but for batches that are larger than all before.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._turns: list[_Turn] = []
        self._place = 0

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns copies on the device of tensors of the host; what is pinned is not packed."""
        pinned = [*map(self._accelerator.is_pinned, tensors)]
        if all(pinned):
            return self.send(None, tensors)
        loose = [one for one, is_pinned in zip(tensors, pinned, strict=True) if not is_pinned]
        layout = layout_of(tuple(map(kind_of, loose)))
        for tensor, place in zip(loose, self.pack(layout), strict=True):
            place.copy_(tensor)
        if len(loose) == len(tensors):
            return self.send(layout)
        others = [one for one, is_pinned in zip(tensors, pinned, strict=True) if is_pinned]
        sent = self.send(layout, others)
        packed, direct = iter(sent), iter(sent[len(loose) :])
        return [next(direct if is_pinned else packed) for is_pinned in pinned]

    def pack(self, layout: Layout) -> list[Tensor]:
        """Returns pinned tensors to fill, which the next :meth:`send` sends."""
        turn = self._free()
        if turn.buffer is None or len(turn.buffer) < layout.bytes:
            size = 1 << (max(layout.bytes, _ALIGNMENT) - 1).bit_length()
            turn.buffer = self._accelerator.pinned(size, torch.uint8)
            turn.packed.clear()
        if layout not in turn.packed:
            if len(turn.packed) == _REMEMBERED:
                turn.packed.clear()
            memory = turn.buffer[: layout.bytes]
            turn.packed[layout] = _Packed(memory, layout.tensors(memory), [])
        return turn.packed[layout].tensors

    def rows(self, layout: Layout) -> list[Bytes]:
        """Returns the bytes, row by row, of what :meth:`pack` has returned: contiguous tensors."""
        packed = self._turns[self._place].packed[layout]
        if not packed.rows:
            packed.rows.append(layout.rows(packed.memory))
        return packed.rows[0]

    def _free(self) -> _Turn:
        """Returns the turn that is next, whose last copy is done: long since, as a rule."""
        if self._place == len(self._turns):
            self._turns.append(_Turn(self._accelerator.event()))
        else:
            self._turns[self._place].event.synchronize()
        return self._turns[self._place]

    def send(self, layout: Layout | None, pinned: Sequence[Tensor] = ()) -> list[Tensor]:
        """Returns copies of what was packed, and of what is pinned elsewhere, on the device."""
        accelerator = self._accelerator
        is_beside = sum(one.nbytes for one in pinned) + (layout.bytes if layout else 0) >= _BESIDE
        turn = self._free() if layout is None else self._turns[self._place]
        with accelerator.on_another_stream() if is_beside else nullcontext():
            copies = [accelerator.copied(tensor) for tensor in pinned]
            if layout is not None:
                copies.append(accelerator.copied(turn.packed[layout].memory))
            turn.event.record()
        self._place = (self._place + 1) % _TURNS
        if is_beside:
            accelerator.wait_for(turn.event)
            for copy in copies:
                # Its memory is the other stream's, which may fill it again once it is let go of.
                accelerator.lend(copy)
        if layout is None:
            return copies
        packed = layout.tensors(copies.pop())
        return [*(map(_apart, packed) if len(packed) > 1 else packed), *copies]
