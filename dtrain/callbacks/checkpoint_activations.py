"""Activation checkpointing: a block is computed again in backward, rather than kept."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtrain.callback import Callback
from dtrain.context import Context
from dtrain.distributed import plain_name
from dtrain.errors import ConfigError
from dtrain.step import Blocks, blocks_of, own_class

_CLASHES = (
    "CheckpointActivations: {what}, and computing a block again would do so a second time: {advice}"
)


class CheckpointActivations(Callback):
    """Keeps only the inputs of the model's blocks for backward, which computes them again.

    Memory for activations becomes that of one block, and of all blocks' inputs; a step takes about
    a third longer. Numbers stay the same, bit by bit, also where a block drops out at random. By
    torch's ``checkpoint``, without reentrance; works with each strategy. Names in checkpoints are
    as ever.

    Args:
        blocks: module classes, their names, or a function from a module's name and the module to
            whether it is one. If None, the model's repeated blocks (docs/sharded.md).

    Raises:
        ConfigError: there are no blocks; or one writes its buffers in each forward, as BatchNorm.
    """

    def __init__(self, blocks: Blocks | None = None) -> None:
        self._given = blocks
        self._changed: list[tuple[nn.Module, type[nn.Module]]] = []  # and of which class they were

    def on_fit_start(self, ctx: Context) -> None:
        self._restore()
        blocks = blocks_of(ctx.model, self._given, "CheckpointActivations")
        if not blocks:
            raise ConfigError(
                "CheckpointActivations: found no repeated blocks in the model (several modules of "
                "one class, with parts of their own, in one container): pass blocks=..."
            )
        if getattr(getattr(ctx.model, "config", None), "use_cache", False):
            raise ConfigError(
                _CLASHES.format(
                    what="the model keeps its blocks' keys and values (config.use_cache)",
                    advice="set model.config.use_cache = False",
                )
            )
        kinds: dict[type[nn.Module], type[nn.Module]] = {}
        for name, module in blocks.items():
            if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
                raise ConfigError(
                    f"CheckpointActivations: {plain_name(name)} has a forward that is not its "
                    "class's, which cannot be exchanged: call torch.utils.checkpoint.checkpoint in "
                    "the model instead"
                )
            kind = type(module)
            # Of the class, not of the object, whose copies would call the original's.
            module.__class__ = kinds.setdefault(kind, _recomputed(kind))
            self._changed.append((module, kind))

    def on_fit_end(self, ctx: Context, error: BaseException | None = None) -> None:
        self._restore()

    on_error = on_fit_end

    def _restore(self) -> None:
        for module, kind in self._changed:
            module.__class__ = kind
        self._changed = []


def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
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
                _CLASHES.format(
                    what=f"{kind.__name__} writes its buffers in its forward, as BatchNorm does",
                    advice="choose other blocks, or use GroupNorm or LayerNorm",
                )
            )
        return returned

    name = own_class(kind).__name__
    return type(name, (kind,), {"forward": forward, "__module__": kind.__module__})


def _written(module: nn.Module) -> list[tuple[int, int]]:
    """Returns what changes where a buffer is written to, or exchanged."""
    if torch.compiler.is_compiling():  # which cannot count
        return []
    return [(id(buffer), buffer._version) for buffer in module.buffers()]
