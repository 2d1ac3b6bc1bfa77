"""Nested state as JSON and named tensors, and back. No pickle."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtrain.errors import CheckpointError

_PLAIN = {bool, str, int, float, type(None)}
_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


class Split(NamedTuple):
    """Nested state, taken apart."""

    plain: Any  # JSON values
    tensors: dict[str, Tensor]  # by path; not copies


def split(state: Any) -> Split:
    """Returns ``state`` as JSON values, and the tensors that are in it, by path.

    Dicts, lists, tuples, tensors, numbers, text, True, False and None may be nested at will; a
    CheckpointError names the path of anything else. A tensor that is there twice is kept once.
    """
    tensors: dict[str, Tensor] = {}
    return Split(_encode(state, "", tensors, {}), tensors)


def join(plain: Any, tensors: dict[str, Any]) -> Any:
    """Returns what :func:`split` was given."""
    if isinstance(plain, list):
        return [join(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if _TENSOR in plain:
        if plain[_TENSOR] not in tensors:
            raise CheckpointError(f"the tensor {plain[_TENSOR]!r} is missing")
        return tensors[plain[_TENSOR]]
    if _TUPLE in plain:
        return tuple(join(value, tensors) for value in plain[_TUPLE])
    if _ITEMS in plain:
        return {join(k, tensors): join(v, tensors) for k, v in plain[_ITEMS]}
    return {key: join(value, tensors) for key, value in plain.items()}


def names_in(plain: Any) -> set[str]:
    """Returns the names of the tensors that a part of what :func:`split` returned refers to."""
    if isinstance(plain, dict) and _TENSOR in plain:
        return {plain[_TENSOR]}
    inner = plain.values() if isinstance(plain, dict) else plain if isinstance(plain, list) else ()
    return {name for value in inner for name in names_in(value)}


def copy_state(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy that shares no memory with ``state``, as a checkpoint would give it back."""
    plain, tensors = split(state)
    copy: dict[str, Any] = join(plain, {name: t.clone() for name, t in tensors.items()})
    return copy


def _encode(value: Any, path: str, tensors: dict[str, Tensor], known: dict[int, str]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | str | int | float):
        return value
    if isinstance(value, Tensor):
        if id(value) in known:
            return {_TENSOR: known[id(value)]}
        # Unique, also where a key has a slash in it or is a name that safetensors reserves.
        name = path or "value"
        if name in tensors or name.startswith("__"):
            name = f"{name}~{len(tensors)}"
        tensors[name] = value.detach()
        known[id(value)] = name
        return {_TENSOR: name}
    under = f"{path}/" if path else ""
    if isinstance(value, tuple | list):
        if {*map(type, value)} <= _PLAIN:  # at once, as a random stream's state
            items = [*value]
        else:
            items = [_encode(v, f"{under}{i}", tensors, known) for i, v in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        values = {k: _encode(v, f"{under}{k}", tensors, known) for k, v in value.items()}
        if all(isinstance(k, str) and not k.startswith("__") for k in value):
            return values
        return {_ITEMS: [[_encode(k, "", tensors, known), v] for k, v in values.items()]}
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    raise CheckpointError(
        f"{path or 'the state'} is {type(value).__name__}; a checkpoint holds dicts, lists, "
        "tuples, tensors, numbers, text, True, False and None"
    )
