"""Makes a model whose parameters take no memory, and can be computed again bit by bit.

Every operation is done for real, on tensors of the CPU: so random numbers are drawn as ever, and
code that looks at values, or whether a tensor is on the meta device, does what it always does. But
memory is let go of when other tensors are worked on, and what filled it is noted; if it is needed
again, that is done again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as modules_of_torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from dtrain.accelerator import give_back_heap
from dtrain.errors import ConfigError
from dtrain.meta.history import (
    Content,
    Geometry,
    Operation,
    Place,
    bytes_of,
    digest_of_bytes,
    leaves_undefined,
    overwrites,
)
from dtrain.meta.unmade import Computed, Unmade, replace

#: What tensors that are not worked on just now may take in memory, together.
KEPT_BYTES = 32 * 2**20
#: What is smaller is not let go of before the end.
SMALL_BYTES = 16 * 2**10

_aten = torch.ops.aten
#: What gives a tensor other memory, or its memory another size.
_MOVES = {_aten.resize_, _aten.resize_as_, _aten.set_}
#: Methods of tensors that look into memory past torch's operations.
_RAW = {
    *(Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.storage),
    *(Tensor.untyped_storage, Tensor._typed_storage, Tensor.share_memory_, Tensor.__dlpack__),
    *(Tensor.__deepcopy__, Tensor.__reduce_ex__),
}


@contextmanager
def meta_init() -> Iterator[None]:
    """Makes a model whose parameters take no memory, until a Trainer takes it.

    They are on the meta device, and each knows how to become what it would have been: bit by bit
    what the same lines make without this. So each rank of ``strategy="fsdp"`` makes one tensor
    after the other, and keeps its own rows (docs/sharded.md); others make all of it. Buffers are
    there at once. Random numbers are drawn as ever.

    Example::

        with dtrain.meta_init():
            model = GPT(config)
        trainer = dtrain.Trainer(model, lambda m: AdamW(m.parameters()), loss_fn, strategy="fsdp")

    All that makes or changes parameters must be within, such as ``model.double()`` or
    ``model.apply(init)``: later, it is an error. :func:`~dtrain.load_model` may come later.

    Raises:
        ConfigError: one is within another.

    Ranks: all, local.
    """
    if any(isinstance(mode, _Recording) for mode in _modes()):
        raise ConfigError("dtrain.meta_init() is in effect already: leave the inner one out")
    recording, made = _Recording(), _Made()
    try:
        with made.noting(), recording, _Raw(recording):
            yield
        recording.turn(made.modules())
    finally:
        recording.give_back()


def _modes() -> list[Any]:
    return torch.utils._python_dispatch._get_current_dispatch_mode_stack()


class _Made:
    """The modules that are given parameters, buffers or parts meanwhile."""

    def __init__(self) -> None:
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def _note(self, module: nn.Module, name: str, given: Any) -> None:
        self._seen.add(module)

    @contextmanager
    def noting(self) -> Iterator[None]:
        with ExitStack() as stack:
            for register in (
                modules_of_torch.register_module_parameter_registration_hook,
                modules_of_torch.register_module_buffer_registration_hook,
                modules_of_torch.register_module_module_registration_hook,
            ):
                stack.callback(register(self._note).remove)
            yield

    def modules(self) -> list[nn.Module]:
        """Returns them, with the parts of each: of what was copied, only the copy is given."""
        return [*dict.fromkeys(part for module in self._seen for part in module.modules())]


@dataclass(eq=False)
class _Memory:
    """Some memory, and how its content came about."""

    ref: StorageWeakRef
    bytes: int
    content: Content
    is_there: bool = True

    def storage(self) -> UntypedStorage | None:
        """Returns it; None once nobody has it any more."""
        if self.ref.expired():
            return None
        return UntypedStorage._new_with_weak_ptr(self.ref.cdata)


class _Recording(TorchDispatchMode):
    """Follows operations on tensors that are made meanwhile; others are let alone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._followed: dict[int, _Memory] = {}
        self._large: dict[int, _Memory] = {}  # what takes memory now, and may be let go of
        self._size = self._freed = 0  # in bytes, of these; and since the heap gave memory back

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return self._do(func, args, kwargs or {})

    def _do(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if _has_memory(leaf)]
        for tensor in given:
            self.bring_back(tensor)
        if func.overloadpacket in _MOVES:
            for tensor in given:
                self.let_alone(tensor)
            return func(*args, **kwargs)
        written = [t for t in _written(func, args, kwargs) if _has_memory(t)]
        before = {id(t): t.clone() for t in written if self._memory(t) is None}
        state = _state_before(func, kwargs)
        returned = func(*args, **kwargs)

        own = {_key(tensor) for tensor in given}
        made = {
            number: leaf
            for number, leaf in enumerate(tree_leaves(returned))
            if _has_memory(leaf) and _key(leaf) not in own
        }
        changed = {_key(t): m for t in written if (m := self._memory(t)) is not None}
        if made or changed:
            at, named = tree_map(lambda leaf: self._place(leaf, before), (args, kwargs))
            operation = Operation(func, at, named, state)
            over = overwrites(func, written)
            for memory in changed.values():
                past = None if over else memory.content
                memory.content = Content(memory.content.memory, memory.bytes, operation, past)
            for number, tensor in made.items():
                if leaves_undefined(func):
                    bytes_of(tensor.untyped_storage()).zero_()
                self._follow(tensor, operation, number)
        self._let_go({*own, *map(_key, made.values())})
        return returned

    def _memory(self, tensor: Tensor) -> _Memory | None:
        return self._followed.get(_key(tensor))

    def _place(self, leaf: Any, before: dict[int, Tensor]) -> Any:
        """Returns what an operation is noted with for one of its arguments."""
        if not isinstance(leaf, Tensor):
            return leaf
        memory = self._memory(leaf) if _has_memory(leaf) else None
        if memory is None or leaf.is_conj() or leaf.is_neg():
            value = before[id(leaf)] if id(leaf) in before else leaf.clone()
            return Place(object(), None, Geometry.of(leaf), value)
        return Place(memory.content.memory, memory.content, Geometry.of(leaf))

    def _follow(self, tensor: Tensor, operation: Operation, number: int) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._followed or not size:
            return
        content = Content(object(), size, operation, None, number)
        self._followed[key] = memory = _Memory(StorageWeakRef(storage), size, content)
        self._count(key, memory)

    def _count(self, key: int, memory: _Memory) -> None:
        if memory.bytes >= SMALL_BYTES:
            self._large[key] = memory
            self._size += memory.bytes

    def bring_back(self, tensor: Tensor) -> None:
        """Has a tensor's memory hold what it held before it was let go of."""
        memory = self._memory(tensor)
        if memory is not None and not memory.is_there:
            storage = tensor.untyped_storage()
            storage.resize_(memory.bytes)
            memory.content.compute(storage)
            memory.is_there = True
            self._count(storage._cdata, memory)
        elif memory is not None and (key := _key(tensor)) in self._large:
            self._large[key] = self._large.pop(key)  # the newest

    def let_alone(self, tensor: Tensor) -> None:
        """Keeps a tensor as it is from here on: others may read and write its memory."""
        self.bring_back(tensor)
        if self._followed.pop(_key(tensor), None) is not None:
            self._drop(_key(tensor))

    def _drop(self, key: int) -> None:
        if memory := self._large.pop(key, None):
            self._size -= memory.bytes

    def _let_go(self, but: set[int]) -> None:
        """Lets go of what was not worked on for longest, if that is too much."""
        if self._size <= KEPT_BYTES:
            return
        for key, memory in [*self._large.items()]:
            if self._size <= KEPT_BYTES:
                break
            storage = memory.storage()
            if storage is None or not storage.resizable():  # nobody has it, or numpy has
                del self._followed[key]
                self._drop(key)
            elif key not in but:
                memory.content.digest = memory.content.digest or digest_of_bytes(storage)
                storage.resize_(0)
                memory.is_there = False
                self._drop(key)
                self._freed += memory.bytes
        if self._freed > KEPT_BYTES:
            self._freed = 0
            give_back_heap()

    def turn(self, modules: list[nn.Module]) -> None:
        """Turns the modules' parameters into those that are not made yet."""
        for p in {
            id(p): p for m in modules for p in m._parameters.values() if p is not None
        }.values():
            self._turn(p)

    def _turn(self, p: nn.Parameter) -> None:
        memory = self._memory(p) if _has_memory(p) and type(p) is nn.Parameter else None
        if memory is None or p.grad is not None or not p.is_leaf:
            return  # as it is, whole
        if memory.content.digest is None:
            memory.content.digest = digest_of_bytes(p.untyped_storage())
        recipe = Computed(memory.content, Geometry.of(p))
        replace(p, Unmade.of(p, recipe))  # or not, if that cannot be: it is whole then

    def give_back(self) -> None:
        """Has all that is left hold what it held: buffers, and what the script keeps."""
        for memory in self._followed.values():
            if not memory.is_there and (storage := memory.storage()) is not None:
                storage.resize_(memory.bytes)
                memory.content.compute(storage)
        self._followed.clear()
        self._large.clear()
        give_back_heap()


class _Raw(TorchFunctionMode):
    """Keeps tensors whole whose memory is looked into past torch's operations."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _RAW and _has_memory(args[0]):
            with _disable_current_modes():
                self._recording.let_alone(args[0])
        return func(*args, **kwargs or {})


def _has_memory(leaf: Any) -> bool:
    """Says whether it is a plain tensor, on the CPU."""
    return (
        isinstance(leaf, Tensor)
        and type(leaf) in (Tensor, nn.Parameter, nn.Buffer)
        and leaf.device.type == "cpu"
        and leaf.layout is torch.strided
        and not leaf.is_quantized
    )


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Returns the tensors that an operation writes to."""
    found: list[Any] = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += tree_leaves(value)
    return found


def _state_before(func: Any, kwargs: dict[str, Any]) -> Tensor | None:
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return None
    generator = kwargs.get("generator") or torch.default_generator
    return generator.get_state() if generator.device.type == "cpu" else None
