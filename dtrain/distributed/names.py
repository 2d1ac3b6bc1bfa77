"""Names of a model's tensors: as the user gave them, also where parts of it are compiled."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from dtrain.distributed.sharded import fill_own_part, is_sharded


def plain_name(name: str) -> str:
    """Returns a tensor's or module's name without what ``torch.compile`` puts into it."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod").removesuffix("_orig_mod")


def named_state(model: nn.Module) -> dict[str, Any]:
    """Returns the model's ``state_dict`` by plain names."""
    return {plain_name(name): value for name, value in model.state_dict().items()}


def named_parameters(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the model's parameters by plain names."""
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        yield plain_name(name), parameter


def load_named(model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Loads tensors by plain names; with ``strict`` all of the model's, and no others."""
    held = model.state_dict()
    own = {plain_name(name): name for name in held}
    named = {own.get(n, n): t for n, t in tensors.items()}
    for name, tensor in named.items():
        mine = held.get(name)
        if not isinstance(mine, Tensor) or not is_sharded(mine) or is_sharded(tensor):
            continue
        if tensor.shape == mine.shape:
            # One after the other, and no more of each than this rank's rows.
            fill_own_part(mine, partial(_part, tensor))
            named[name] = mine
    model.load_state_dict(named, strict=strict)


def _part(tensor: Tensor, at: tuple[slice, ...]) -> Tensor:
    return tensor[at]
