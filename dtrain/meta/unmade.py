"""Parameters that are not made yet: on the meta device, with what they are to become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dtrain.distributed import named_parameters, some_of
from dtrain.errors import ConfigError
from dtrain.meta.history import Content, Geometry, digest_of_bytes

#: What may be asked of a parameter that is not made: nothing of its values.
_ASKED = {
    *(torch.is_complex, torch.is_floating_point, torch.numel, Tensor.is_complex),
    *(Tensor.is_floating_point, Tensor.numel, Tensor.nelement, Tensor.size, Tensor.dim),
    *(Tensor.ndimension, Tensor.stride, Tensor.storage_offset, Tensor.is_contiguous),
    *(Tensor.element_size, Tensor.get_device, Tensor.requires_grad_, Tensor.detach),
    *(Tensor.__hash__, Tensor.__len__, Tensor.__repr__, Tensor.__format__, Tensor.is_signed),
    *(Tensor.is_conj, Tensor.is_neg, Tensor.is_inference, torch.is_inference),
}
#: What optimizers begin their state with, once a parameter has a place.
_LIKE = {torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like}
#: What attributes give, or take, that is of its values.
_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}


class Recipe(Protocol):
    """What a tensor is to become."""

    def mark(self) -> object:
        """Returns what is equal only where the tensors to come are; JSON values."""

    def digest(self) -> str:
        """Returns what is equal where the tensors to come are, which takes longer."""

    def whole(self) -> Tensor:
        """Returns the tensor, on the CPU; nobody else has its memory."""

    def part(self, at: tuple[slice, ...]) -> Tensor:
        """Returns a part of it, likewise."""


class Computed:
    """A tensor that is computed again, as when the model was made."""

    def __init__(self, content: Content, geometry: Geometry) -> None:
        self._content, self._geometry = content, geometry

    def mark(self) -> object:
        """Returns a digest of its bits, and how they lie."""
        return self._content.digest, [*self._geometry.size], str(self._geometry.dtype)

    def digest(self) -> str:
        """Returns that, too."""
        return str(self.mark())

    def whole(self) -> Tensor:
        """Returns it."""
        return self._geometry.on(self._content.compute())

    def part(self, at: tuple[slice, ...]) -> Tensor:
        """Returns a part of it; all of it is computed."""
        return self.whole()[at]


@dataclass(frozen=True)
class Given:
    """A tensor that lies elsewhere, as in a file, of which is read what is asked for."""

    read: Callable[[tuple[slice, ...]], Tensor]
    dtype: torch.dtype  # that it is to have
    file: str  # by what two of equal content are told from others

    def mark(self) -> object:
        """Returns what is equal where the files are."""
        return self.file, str(self.dtype)

    def digest(self) -> str:
        """Returns that of its bits; all of it is read."""
        return digest_of_bytes(self.whole().untyped_storage())

    def whole(self) -> Tensor:
        """Returns it."""
        return self.part(())

    def part(self, at: tuple[slice, ...]) -> Tensor:
        """Returns a part of it, copied."""
        return self.read(at).to(self.dtype).contiguous()


class Unmade(nn.Parameter):
    """A parameter that is not made yet; whatever is done with its values is an error."""

    recipe: Recipe

    @classmethod
    def of(cls, like: Tensor, recipe: Recipe, device: str = "meta") -> Unmade:
        """Returns one that looks as ``like`` does."""
        empty = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=device)
        made = torch.Tensor._make_subclass(cls, empty, like.requires_grad)
        made.recipe = recipe
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Raises ConfigError for what needs values, or would change them."""
        # Of attributes, the function is of the descriptor that bears the name.
        described = getattr(func, "__self__", None)
        attribute = getattr(described, "__name__", None)
        is_attribute = func.__name__ in ("__get__", "__set__", "__delete__")
        is_asked = func in _ASKED or (is_attribute and attribute not in _VALUES)
        if is_asked or (func in _LIKE and args[0].device.type != "meta"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs or {})
        name = attribute if is_attribute else func.__name__
        raise ConfigError(
            f"{name!r} on a parameter of dtrain.meta_init(), which has no values until a Trainer "
            "takes the model. What makes or changes parameters, put within `with "
            "dtrain.meta_init():`; weights load by dtrain.load_model; make the optimizer by a "
            "function, Trainer(model, lambda m: ...); a Trainer moves the model itself"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Unmade:
        if id(self) not in memo:
            memo[id(self)] = copied = Unmade.of(self, self.recipe, self.device.type)
            vars(copied).update(vars(self))
        found: Unmade = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ConfigError("a model of dtrain.meta_init() has no values yet, and is not pickled")


def replace(old: nn.Parameter, new: nn.Parameter) -> bool:
    """Has all that hold ``old`` hold ``new`` in its place; says whether that could be.

    It cannot where autograd has it, or a weak reference: then nothing is changed.
    """
    vars(new).update({n: value for n, value in vars(old).items() if n not in vars(new)})
    if type(new) is nn.Parameter:
        vars(new).pop("recipe", None)
    try:
        torch.utils.swap_tensors(old, new)
    except RuntimeError:
        return False
    return True


def not_made(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, Unmade]:
    """Returns the parameters that are not made, by plain name."""
    named = named_parameters(model, remove_duplicate=remove_duplicate)
    return {name: p for name, p in named if isinstance(p, Unmade)}


def check_made(model: nn.Module) -> None:
    """Raises ConfigError for parameters or buffers on the meta device that nothing makes."""
    held = [*named_parameters(model), *model.named_buffers()]
    if bare := [n for n, t in held if t.is_meta and not isinstance(t, Unmade)]:
        raise ConfigError(
            f"{some_of(bare)} are on the meta device, and nothing says what they are to become: "
            "make the model within `with dtrain.meta_init():`, instead of torch.device('meta') or "
            "accelerate's init_empty_weights, and Trainer makes its weights"
        )


def make(model: nn.Module) -> None:
    """Makes all parameters of a model that are not made."""
    for name, p in not_made(model).items():
        _become(name, p, nn.Parameter(p.recipe.whole(), requires_grad=p.requires_grad))


def move_made(model: nn.Module, device: torch.device) -> None:
    """Moves all else, parameters and buffers, to a device."""
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and not isinstance(p, Unmade):
                p.data = p.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def place(model: nn.Module) -> dict[str, Recipe]:
    """Gives parameters that are not made a place on the CPU, and returns their recipes by name.

    So an optimizer finds them where they will be. A place takes no memory as long as nobody reads
    or writes it; and nobody can, before it is opened.
    """
    recipes = {}
    for name, p in not_made(model).items():
        recipes[name] = p.recipe
        _become(name, p, Unmade.of(p, p.recipe, "cpu"))
    return recipes


def open_places(model: nn.Module) -> None:
    """Makes plain parameters of those that have a place, with anything in it."""
    for name, p in not_made(model).items():
        with torch._C.DisableTorchFunctionSubclass():
            opened = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        _become(name, p, opened)


def _become(name: str, p: Unmade, new: nn.Parameter) -> None:
    if p._version:
        raise ConfigError(
            f"{name} was written to after dtrain.meta_init(), which cannot be done again: put that "
            "within it"
        )
    if not replace(p, new):
        raise ConfigError(
            f"{name} is in use elsewhere (a view, a graph of autograd, a weak reference), and so "
            "cannot be made in its place: let go of that before the Trainer is made"
        )
