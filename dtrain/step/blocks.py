"""A model's blocks: parts that come several times, and are treated each as a whole."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from dtrain.errors import ConfigError

#: What is to be a block: module classes, their names, or a rule of a module and its name.
Blocks = type[nn.Module] | Sequence[type[nn.Module] | str] | Callable[[str, nn.Module], bool]


def blocks_of(model: nn.Module, given: Blocks | None, owner: str = "FSDP") -> dict[str, nn.Module]:
    """Returns the blocks by name, in the model's order; empty where it has none of itself.

    Raises ConfigError where what its ``owner`` was ``given`` chooses none, or a list of them.
    """
    if given is None:
        return _repeated(model)
    chosen = {
        name: module
        for name, module in _with_parameters(model)
        if _is_one(given, name, module, owner)
    }
    if lists := [name for name, module in chosen.items() if _is_list(module)]:
        raise ConfigError(
            f"{owner}(blocks=...): {lists[0]} is a list of modules, which is never called itself: "
            "choose what is in it"
        )
    if not chosen:
        kinds = Counter(own_class(type(module)).__name__ for _, module in _with_parameters(model))
        raise ConfigError(
            f"{owner}(blocks={given!r}) chose no part of the model, which has "
            f"{', '.join(f'{count} x {kind}' for kind, count in kinds.most_common(8)) or 'none'}. "
            "Pass the class of its repeated blocks, or leave it out"
        )
    return chosen


def _with_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if name and any(True for _ in module.parameters()):
            yield name, module


def _is_one(given: Any, name: str, module: nn.Module, owner: str) -> bool:
    if isinstance(given, type):
        return isinstance(module, given)
    if callable(given):
        return bool(given(name, module))
    if not isinstance(given, str) and all(isinstance(one, type | str) for one in given):
        kind = own_class(type(module))
        return any(
            kind.__name__ == one if isinstance(one, str) else isinstance(module, one)
            for one in given
        )
    raise ConfigError(
        f"{owner}(blocks={given!r}): pass a module class, a list of classes or of their names, or "
        "a function from a module's name and the module to whether it is a block"
    )


def _repeated(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the model's repeated blocks.

    Those that it names itself (transformers' ``_no_split_modules``), or what has parts of its own
    and comes several times, of one class, in one container.
    """
    named = getattr(model, "_no_split_modules", None)
    if isinstance(named, list | tuple | set) and named:
        found = {n: m for n, m in _with_parameters(model) if own_class(type(m)).__name__ in named}
        if found:
            return found
    blocks: dict[str, nn.Module] = {}
    for name, container in model.named_modules():
        if any(name == block or name.startswith(f"{block}.") for block in blocks):
            continue
        children = {
            f"{name}.{key}" if name else key: child
            for key, child in container.named_children()
            if next(child.children(), None) is not None
            and next(child.parameters(), None) is not None
        }
        counts = Counter(map(type, children.values()))
        blocks |= {n: m for n, m in children.items() if counts[type(m)] > 1 and not _is_list(m)}
    return blocks


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def own_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Returns a module's class, as it was before it was sharded."""
    base = kind.__bases__[-1]  # fully_shard makes a class of two, of such a name
    return base if kind.__name__ == f"FSDP{base.__name__}" else kind
