"""How the content of a tensor's memory came about, so that it can be computed again.

A content is what an operation of torch's left, of what was there before. It holds the operation's
arguments, of which a tensor is the content of some memory in turn; and where random numbers were
drawn, the state of the generator just before.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_leaves, tree_map

from dtrain.errors import ConfigError


class Geometry(NamedTuple):
    """Where in some memory a tensor lies."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Geometry:
        """Returns that of a tensor."""
        offset = int(tensor.storage_offset())
        return cls(tensor.dtype, tensor.size(), tensor.stride(), offset)

    def on(self, storage: UntypedStorage) -> Tensor:
        """Returns the tensor that lies so in ``storage``."""
        flat = torch.empty(0, dtype=self.dtype)
        return flat.set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True, eq=False)
class Place:
    """A tensor among an operation's arguments: in which memory, with what in it then."""

    memory: object  # stands for the memory; only whether two are the same is asked
    content: Content | None  # None for what is in ``value``
    geometry: Geometry
    value: Tensor | None = None  # a copy of what nobody has followed


@dataclass(frozen=True, eq=False)
class Operation:
    """A call of one of torch's operations, with tensors as places."""

    func: Any
    args: Any
    kwargs: Any
    state: Tensor | None  # of the generator, where random numbers were drawn

    def run(self, memory: object, storage: UntypedStorage | None) -> Any:
        """Does it again; where ``memory`` was among the arguments, ``storage`` is."""
        kept: dict[int, UntypedStorage] = {} if storage is None else {id(memory): storage}

        def tensor_of(leaf: Any) -> Any:
            if not isinstance(leaf, Place):
                return leaf
            if leaf.content is None:
                assert leaf.value is not None
                return leaf.value.clone()
            if id(leaf.memory) not in kept:
                kept[id(leaf.memory)] = leaf.content.compute()
            return leaf.geometry.on(kept[id(leaf.memory)])

        args, kwargs = tree_map(tensor_of, (self.args, self.kwargs))
        if self.state is None:
            return self.func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            kwargs["generator"] = torch.Generator().set_state(self.state)
            return self.func(*args, **kwargs)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            return self.func(*args, **kwargs)


@dataclass(eq=False)
class Content:
    """What is in some memory, after an operation."""

    memory: object
    bytes: int
    operation: Operation
    before: Content | None  # None where nothing of it was looked at, or there was no memory yet
    output: int | None = None  # which of the operation's results it is; None where it wrote to it
    digest: str | None = None  # of the bytes, once they were let go of

    def compute(self, storage: UntypedStorage | None = None) -> UntypedStorage:
        """Computes it into ``storage``, or into new memory; raises ConfigError if bits differ."""
        chain: list[Content] = []
        content: Content | None = self
        while content is not None:
            chain.append(content)
            content = content.before
        with torch.no_grad():
            storage = UntypedStorage(self.bytes) if storage is None else storage
            for content in reversed(chain):
                content._step(storage)
        if self.digest is not None and digest_of_bytes(storage) != self.digest:
            raise ConfigError(
                f"{self.operation.func} gave other bits when it was done again: it is not "
                "deterministic. Make the model without dtrain.meta_init"
            )
        return storage

    def _step(self, storage: UntypedStorage) -> None:
        if self.output is None:
            self.operation.run(self.memory, storage)
        elif leaves_undefined(self.operation.func):
            bytes_of(storage).zero_()
        else:
            made = tree_leaves(self.operation.run(self.memory, None))[self.output]
            bytes_of(storage).copy_(bytes_of(made.untyped_storage())[: storage.nbytes()])


def bytes_of(storage: UntypedStorage) -> Tensor:
    """Returns memory as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


def digest_of_bytes(storage: UntypedStorage) -> str:
    """Returns what hardly any other bytes have."""
    # Not by numpy, after which no memory can be let go of.
    held = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return hashlib.sha256(held).hexdigest()


def overwrites(func: Any, written: Sequence[Tensor]) -> bool:
    """Says whether an operation left nothing of what was in the memory of ``written``."""
    if len(written) != 1 or func.overloadpacket not in _OVERWRITE:
        return False
    (tensor,) = written
    return tensor.nbytes == tensor.untyped_storage().nbytes() and _is_dense(tensor)


def _is_dense(tensor: Tensor) -> bool:
    """Says whether no two numbers are in one place."""
    strides = sorted(zip(tensor.stride(), tensor.size(), strict=True))
    dense = 1
    for stride, size in strides:
        if size > 1 and stride != dense:
            return False
        dense *= size
    return True


_aten = torch.ops.aten
_OVERWRITE = {
    _aten.bernoulli_,
    _aten.cauchy_,
    _aten.copy_,
    _aten.exponential_,
    _aten.fill_,
    _aten.geometric_,
    _aten.log_normal_,
    _aten.normal_,
    _aten.random_,
    _aten.uniform_,
    _aten.zero_,
}
_UNDEFINED = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty}
_UNDEFINED |= {_aten.new_empty_strided, _aten.empty_permuted}


def leaves_undefined(func: Any) -> bool:
    """Says whether what it makes holds anything; here, zeros: so it can be made again."""
    return func.overloadpacket in _UNDEFINED
