"""Lets a fault loose in a rank's process: in a hook, or between two writes of a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtrain.callback import Callback
from dtrain.checkpoint import disk
from dtrain.context import Context, Step
from dtrain.trials.drill.orders import Fault
from dtrain.trials.drill.record import Recorder

_OPERATIONS = {"kill writing": ("write_tensors", "write_bytes"), "kill renaming": ("sync_folder",)}


class Striker(Callback):
    """Last in the list: when it strikes, all other callbacks have done what they do.

    Args:
        fault: what to do; None does nothing.
        recorder: is told just before.
        folder: where ranks leave the numbers of their processes.
        rank: this one.
        size: how many there are.

    Ranks: all, local.
    """

    name = "drill: striker"

    def __init__(
        self, fault: Fault | None, recorder: Recorder, folder: Path, rank: int, size: int
    ) -> None:
        self._fault = fault
        self._recorder = recorder
        self._folder = folder
        self._rank = rank
        self._size = size
        self._places = 0
        _process_file(folder, rank).write_text(str(os.getpid()))

    def on_grads_ready(self, ctx: Context, step: Step) -> None:
        """Strikes before the update, if it is to."""
        self._strike_in("on_grads_ready", step.number)

    def on_step_end(self, ctx: Context, step: Step) -> None:
        """Strikes after the update, if it is to."""
        self._strike_in("on_step_end", step.number + 1)

    def on_save(self, ctx: Context) -> None:
        """Lays the fault into the making of this checkpoint, if it is to strike there."""
        fault = self._fault
        if fault is None or self._rank != fault.rank or ctx.progress.step != fault.step:
            return
        for name in _OPERATIONS.get(fault.kind, ()):
            vars(disk)[name] = self._counted(fault, getattr(disk, name))

    def _strike_in(self, hook: str, step: int) -> None:
        fault = self._fault
        if fault is None or fault.kind in _OPERATIONS or self._rank != fault.rank:
            return
        if (hook, step) != (fault.hook, fault.step):
            return
        moment = "after the update" if hook == "on_step_end" else "before the update"
        if fault.kind == "preempt":
            self._recorder.tell("struck", what=f"SIGTERM to rank {self._rank}")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if fault.kind == "kill one":
            self._recorder.tell("struck", what=f"kill -9 of rank {self._rank}, {moment}")
        else:
            self._recorder.tell("struck", what=f"kill -9 of all ranks, {moment}")
            for other in range(self._size):
                if other != self._rank:
                    # In this step all of them are here: it took a reduction to come to it.
                    os.kill(int(_process_file(self._folder, other).read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def _counted(self, fault: Fault, real: Callable[..., None]) -> Callable[..., None]:
        """Returns ``real``, but for one call of it that is the last."""

        def counted(path: Path, *content: Any) -> None:
            place, self._places = self._places, self._places + 1
            real(path, *content)
            if place != fault.place:
                return
            if fault.kind == "kill renaming":
                where = "just after" if path.name == "checkpoints" else "just before"
                what = f"{where} it was renamed into place"
            else:
                os.truncate(path, path.stat().st_size // 2)
                what = f"half of {path.name} written"
            self._recorder.tell("struck", what=f"kill -9 within a save, {what}")
            os.kill(os.getpid(), signal.SIGKILL)

        return counted


def _process_file(folder: Path, rank: int) -> Path:
    return folder / f"process-{rank}.txt"
