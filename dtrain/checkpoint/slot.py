"""The slot that a callback fills to decide when to save and what to keep."""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from dtrain.context import Progress


@runtime_checkable
class CheckpointSlot(Protocol):
    """Fills the checkpoint slot: when to save and what to keep."""

    #: Whether training goes on while a checkpoint is written.
    background: bool
    #: Whether a checkpoint may lack weights that were never trained.
    trainable_only: bool

    def select(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns what to save of the model's state, by name; equal on all ranks."""

    def due_after_step(self, progress: Progress) -> bool:
        """Says whether this step is to be saved; equal on all ranks, must not communicate."""

    def due_after_epoch(self, progress: Progress) -> bool:
        """The same, asked after an epoch and its evaluation."""

    def prune(self, saved: list[tuple[int, dict[str, float]]]) -> list[int]:
        """Returns the steps to delete, given each saved step (oldest first) and its metrics.

        Ranks: rank 0 only; perhaps in a thread beside the training.
        """
