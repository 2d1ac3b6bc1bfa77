"""Which runs there are below a folder, and where each stands."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from dtrain.checkpoint import format as files
from dtrain.checkpoint.status import read
from dtrain.errors import CheckpointError, ResumeError


@dataclass(frozen=True, slots=True)
class RunLine:
    """A run, in a line.

    Attributes:
        folder: its ``run_dir``.
        state: as in ``status.json``; ``"damaged"`` where that cannot be read.
        step: global steps taken, as last told.
        best: the best figures of an evaluation among its checkpoints, in words, by the metric that
            ``Checkpoint(best=...)`` names; else those of the newest.
        saved: the newest checkpoint's step; None where there is none.
        age_s: seconds since the run last told of itself.
    """

    folder: Path
    state: str
    step: int
    best: str
    saved: int | None
    age_s: float


def list_runs(folder: Path) -> list[RunLine]:
    """Returns the runs in ``folder`` and below, by name; a run's own folders are not looked into.

    Raises CheckpointError where there is no such folder. Ranks: rank 0 only.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder")
    found = []
    for place, below, names in os.walk(folder):
        below.sort()
        if "status.json" in names:
            found.append(_line(Path(place)))
            below.clear()
    return found


def _line(run_dir: Path) -> RunLine:
    saved = files.listed(run_dir / "checkpoints")
    newest = saved[-1].step if saved else None
    try:
        status = read(run_dir)
    except ResumeError:
        status = None
    if status is None:
        return RunLine(run_dir, "damaged", newest or 0, _best(saved), newest, 0.0)
    age_s = max(0.0, time.time() - status.updated)
    return RunLine(run_dir, status.status, status.step, _best(saved), newest, age_s)


def _best(saved: list[files.Saved]) -> str:
    if not saved:
        return ""
    try:
        by = files.whose_weights(saved[-1].path)["best_by"]
    except CheckpointError:  # damaged; its figures are in another file
        by = None
    if by and (best := files.best_of(saved, *by)):
        return f"{by[0]} {best.metrics[by[0]]:.4g} (step {best.step})"
    told = [f"{n} {v:.4g}" for n, v in saved[-1].metrics.items() if n.startswith("eval/")]
    return ", ".join(told[:2])
