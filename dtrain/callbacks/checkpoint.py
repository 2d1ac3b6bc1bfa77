"""When to make a checkpoint, and which to keep."""

from __future__ import annotations

from typing import Literal

from dtrain.callback import Callback
from dtrain.errors import ConfigError
from dtrain.state import Progress


class Checkpoint(Callback):
    """Saves the run every so many steps or epochs, and at its end; keeps the newest.

    A checkpoint is written aside and renamed into place: it is there whole, or not at all. An
    older one is deleted only after that. What is equal on all ranks is divided among them, and each
    writes its share. One that cannot be written is reported, and tried again at the next report;
    only the last one of a run must succeed.

    Example::

        Checkpoint(every_steps=500, keep=3, best="eval/accuracy", mode="max")

    Args:
        every_steps: save after every so many global steps.
        every_epochs: save after every so many epochs, after their evaluation.
        keep: how many of the newest to keep; None keeps all.
        best: keep also the one with the best value of this metric.
        mode: whether less (``"min"``) or more (``"max"``) is better.
        background: training waits only while a copy is made, and goes on while it is written. Each
            rank keeps memory for a copy of its share, on its host. False waits for the disk.

    Raises:
        ConfigError: an argument is off.

    Ranks: all, local; the saving itself is the Trainer's.
    """

    def __init__(
        self,
        *,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        keep: int | None = 3,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
        background: bool = True,
    ) -> None:
        if every_steps is None and every_epochs is None:
            every_epochs = 1
        for name, value in (
            ("every_steps", every_steps),
            ("every_epochs", every_epochs),
            ("keep", keep),
        ):
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ConfigError(f"Checkpoint({name}={value!r}): must be 1 or more")
        if mode not in ("min", "max"):
            raise ConfigError(f"Checkpoint(mode={mode!r}): choose 'min' or 'max'")
        self.background = background
        self._every_steps = every_steps
        self._every_epochs = every_epochs
        self._keep = keep
        self._best = best
        self._sign = 1.0 if mode == "min" else -1.0

    def due_after_step(self, progress: Progress) -> bool:
        """Fills the checkpoint slot: every ``every_steps``."""
        return self._every_steps is not None and progress.step % self._every_steps == 0

    def due_after_epoch(self, progress: Progress) -> bool:
        """Fills the checkpoint slot: every ``every_epochs``, or ``every_steps`` fell on it."""
        by_epoch = self._every_epochs is not None and (progress.epoch + 1) % self._every_epochs == 0
        return by_epoch or self.due_after_step(progress)

    def prune(self, saved: list[tuple[int, dict[str, float]]]) -> list[int]:
        """Fills the checkpoint slot: all but the newest ``keep``, and the best."""
        if self._keep is None:
            return []
        kept = {step for step, _ in saved[-self._keep :]}
        if self._best is not None:
            scored = [
                (self._sign * metrics[self._best], step)
                for step, metrics in saved
                if self._best in metrics
            ]
            if scored:
                kept.add(min(scored)[1])
        return [step for step, _ in saved if step not in kept]
