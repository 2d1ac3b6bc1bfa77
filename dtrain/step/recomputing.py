"""Blocks of which only the inputs are kept for backward, which computes them again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrain.distributed import plain_name
from dtrain.errors import ConfigError
from dtrain.step.blocks import own_class


def recompute(
    model: nn.Module, blocks: Mapping[str, nn.Module], owner: str
) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Has blocks computed again in backward; returns them, with the classes that they had.

    Raises ConfigError where there are none, or that cannot be.
    """
    if not blocks:
        raise ConfigError(
            f"{owner}: found no repeated blocks in the model (several modules of one class, with "
            "parts of their own, in one container): pass blocks=..."
        )
    for name, module in blocks.items():
        if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"{owner}: {plain_name(name)} has a forward that is not its class's, which cannot "
                "be exchanged: call torch.utils.checkpoint.checkpoint in the model instead"
            )
    if getattr(getattr(model, "config", None), "use_cache", False):
        raise ConfigError(
            f"{owner}: the model keeps its blocks' keys and values (config.use_cache), and would "
            "add them a second time where a block is computed again: set model.config.use_cache = "
            "False"
        )
    kinds = {kind: _recomputed(kind, owner) for kind in {*map(type, blocks.values())}}
    changed = [(module, type(module)) for module in blocks.values()]
    for module, kind in changed:
        # Of the class, not of the object, whose copies would call the original's.
        module.__class__ = kinds[kind]
    return changed


def _recomputed(kind: type[nn.Module], owner: str) -> type[nn.Module]:
    """Returns the same class, but that its forward is computed again in backward."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args, **kwargs)
        before = _written(self)

        def run(args: Any, kwargs: Any, _: Tensor) -> Any:
            return kind.forward(self, *args, **kwargs)

        # Its options would take arguments of their names. It keeps the random state of the devices
        # of tensors that it sees; inputs may be hidden in an object.
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        here = torch.empty(0, device=device)
        returned = checkpoint(run, args, kwargs, here, use_reentrant=False)
        if _written(self) != before:
            raise ConfigError(
                f"{owner}: {kind.__name__} writes its buffers in its forward, as BatchNorm does, "
                "and would do so a second time where it is computed again: choose other blocks, or "
                "use GroupNorm or LayerNorm"
            )
        return returned

    name = own_class(kind).__name__
    return type(name, (kind,), {"forward": forward, "__module__": kind.__module__})


def _written(module: nn.Module) -> list[tuple[int, int]]:
    """Returns what changes where a buffer is written to, or exchanged."""
    if torch.compiler.is_compiling():  # which cannot count
        return []
    return [(id(buffer), buffer._version) for buffer in module.buffers()]
