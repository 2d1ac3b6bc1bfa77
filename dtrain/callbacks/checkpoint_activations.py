"""Activation checkpointing: blocks are computed again in backward, rather than kept."""

from torch import nn

from dtrain.callback import Callback
from dtrain.context import Context
from dtrain.step import Blocks, blocks_of, recompute


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
        blocks = blocks_of(ctx.model, self._given, self.name)
        self._changed = recompute(ctx.model, blocks, self.name)

    def on_fit_end(self, ctx: Context, error: BaseException | None = None) -> None:
        self._restore()

    on_error = on_fit_end

    def _restore(self) -> None:
        for module, kind in self._changed:
            module.__class__ = kind
        self._changed = []
