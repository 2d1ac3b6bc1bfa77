"""When to make a checkpoint, and which to keep: fills the checkpoint slot."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dtrain.callback import Callback
from dtrain.callbacks.argument_checks import (
    check_choice,
    check_counts,
    figure_of,
    find_metric,
    some_of,
)
from dtrain.context import Context, Progress
from dtrain.distributed import named_parameters, named_state, own_memory, share_buffers, whole
from dtrain.errors import CheckpointError


class Checkpoint(Callback):
    """Saves the run every so many steps or epochs, and at its end; keeps the newest.

    A checkpoint is renamed into place, whole or not at all, before an older one is deleted. What is
    equal on all ranks is divided among them, and each writes its share. One that cannot be written
    is reported, and tried again at the next report; only the last one of a run must succeed. On
    resuming, CheckpointError tells which of ``modules`` it lacks, or which left out weights differ.
    Example: ``Checkpoint(every_steps=500, keep=3, best="eval/accuracy", mode="max")``.

    Args:
        every_steps: save after every so many global steps.
        every_epochs: save after every so many epochs, after their evaluation; 1 by default.
        every_fits: where a script has many short fits: save at the end of every so many of them,
            not of each. (A run that is told to leave is saved in any case.)
        keep: how many of the newest to keep; None keeps all.
        best: keep also the one with the best value of this metric, ``eval/...`` or ``train/...``.
            Whenever an evaluation (or an epoch's mean) is the best so far, these very weights are
            saved, too. What is not finite is never the best.
        mode: whether less (``"min"``) or more (``"max"``) is better.
        trainable_only: leave out weights that have not changed, such as a base model under
            adapters. The script makes these as it did before; on resuming, they are compared.
            (They are looked through at each save.)
        modules: other modules that a resumed run needs whole, by name: a teacher, a target network.
        background: training waits only while a copy is made, and goes on while it is written. Each
            rank keeps memory for a copy of its share, on its host. False waits for the disk.

    Ranks: all, communicates at a save where there are ``modules``.
    """

    def __init__(
        self,
        *,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        every_fits: int | None = None,
        keep: int | None = 3,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
        trainable_only: bool = False,
        modules: Mapping[str, nn.Module] | None = None,
        background: bool = True,
    ) -> None:
        if every_steps is None and every_epochs is None and every_fits is None:
            every_epochs = 1
        check_counts("Checkpoint", or_none=True, every_steps=every_steps, every_epochs=every_epochs)
        check_counts("Checkpoint", or_none=True, every_fits=every_fits, keep=keep)
        check_choice("Checkpoint", "mode", mode, ("min", "max"))
        self.background = background
        self.trainable_only = trainable_only
        self._modules = dict(modules or {})
        self._trained: set[str] = set()  # names of parameters that may have changed
        self._frozen_sums: dict[str, int] = {}  # of all others, as the script made them
        self._every_steps = every_steps
        self._every_epochs = every_epochs
        self._every_fits = every_fits or 1
        self._keep = keep
        self._best = best or ""
        self.monitors = (best,) if best else ()
        self.best_by = (figure_of(best), mode) if best else None
        self._best_value = math.inf  # of sign * value: less is better
        self._sign = 1.0 if mode == "min" else -1.0

    def on_fit_start(self, ctx: Context) -> None:
        for module in self._modules.values():
            own_memory(module)
        self._note_trainable(ctx.model)
        self._frozen_sums = self._sums_of_left_out(ctx.model)

    def on_epoch_start(self, ctx: Context) -> None:
        self._note_trainable(ctx.model)

    on_epoch_end = on_epoch_start  # or unfrozen later than that

    def on_save(self, ctx: Context) -> None:
        for module in self._modules.values():
            share_buffers(module, ctx.comm)  # as those of the model itself
        self._note_trainable(ctx.model)  # and what changed without a step: a teacher's weights
        now, sums = self._sums_of_left_out(ctx.model), self._frozen_sums
        self._trained |= {name for name, bits in now.items() if sums.get(name) != bits}

    def select(self, model: nn.Module) -> dict[str, Tensor]:
        left_out = self._left_out(model)
        return {name: t for name, t in named_state(model).items() if name not in left_out}

    def state_dict(self) -> dict[str, Any]:
        return {
            "modules": {name: module.state_dict() for name, module in self._modules.items()},
            "trained": sorted(self._trained) if self.trainable_only else [],
            "frozen": {n: bits for n, bits in self._frozen_sums.items() if n not in self._trained},
            "best_value": self._best_value,
            "best_by": [*self.best_by] if self.best_by else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if missing := [name for name in self._modules if name not in state["modules"]]:
            raise CheckpointError(
                f"Checkpoint(modules=...): the checkpoint has no {', '.join(missing)}; it has "
                f"{', '.join(state['modules']) or 'none'}"
            )
        for name, module in self._modules.items():
            module.load_state_dict(state["modules"][name])
        mine = [*self.best_by] if self.best_by else None
        if state.get("best_by", mine) == mine:  # else a value of another metric, or the worst
            self._best_value = state.get("best_value", math.inf)
        self._trained |= set(state["trained"])
        sums = self._frozen_sums
        if changed := [name for name, bits in state["frozen"].items() if sums.get(name) != bits]:
            raise CheckpointError(
                "the checkpoint was made with trainable_only=True, and weights that it left out "
                f"are not what they were then: {some_of(changed, 5)}. Load the same base model "
                "before fit, and freeze the same weights, as at the first start."
            )

    def due_after_step(self, progress: Progress) -> bool:
        return self._every_steps is not None and progress.step % self._every_steps == 0

    def due_after_epoch(self, progress: Progress) -> bool:
        by_epoch = self._every_epochs is not None and (progress.epoch + 1) % self._every_epochs == 0
        return by_epoch or self.due_after_step(progress)  # which may fall on the epoch's end

    def due_after_fit(self, progress: Progress) -> bool:
        return (progress.phase + 1) % self._every_fits == 0

    def due_for(self, kind: Literal["eval", "epoch"], figures: Mapping[str, float]) -> bool:
        if not figure_of(self._best).startswith(f"{kind}/"):
            return False
        value = self._sign * find_metric("Checkpoint", self._best, figures)
        is_best = value < self._best_value  # NaN is not
        if is_best:
            self._best_value = value
        return is_best

    def prune(self, saved: list[tuple[int, dict[str, float]]]) -> list[int]:
        if self._keep is None:
            return []
        kept = {step for step, _ in saved[-self._keep :]}
        best = figure_of(self._best)
        scored = [
            (self._sign * values[best], step)
            for step, values in saved
            if math.isfinite(values.get(best, math.nan))
        ]
        if scored:
            kept.add(min(scored)[1])
        return [step for step, _ in saved if step not in kept]

    def _note_trainable(self, model: nn.Module) -> None:
        self._trained |= {name for name, p in self._left_out(model).items() if p.requires_grad}

    def _left_out(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Returns what was not trained so far, by name; a tied one under each of its names."""
        named = named_parameters(model, remove_duplicate=False) if self.trainable_only else ()
        return {name: p for name, p in named if name not in self._trained}

    def _sums_of_left_out(self, model: nn.Module) -> dict[str, int]:
        # One after the other, where a rank holds some rows: all ranks are here.
        return {name: _sum_of_bits(whole(p)) for name, p in self._left_out(model).items()}


def _sum_of_bits(tensor: Tensor) -> int:
    """Returns a number that another base model's weights would hardly have."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().view(-1)
    return int(flat.view(words[flat.element_size()]).sum(dtype=torch.int64))
