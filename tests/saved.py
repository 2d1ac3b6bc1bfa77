"""Checkpoints for tests, made as the Trainer makes them."""

from pathlib import Path
from typing import Any

import torch

from dtrain.checkpoint import format as files
from dtrain.checkpoint import tree
from dtrain.checkpoint import writer as writing
from dtrain.checkpoint.writer import Content, Stage
from dtrain.distributed.comm import Comm


def save(
    folder: Path,
    step: int,
    *,
    model: Any = None,
    state: Any = None,
    rank_state: Any = None,
    rank: int = 0,
    size: int = 1,
    comm: Comm | None = None,
) -> Path:
    """Writes a checkpoint of ``step``, whose numbers tell the step if they are not given."""
    comm = comm or Comm()
    with comm.lockstep("saving a checkpoint"):
        content = Content(
            step=step,
            model=model or {"weight": torch.full((40,), float(step))},
            state=tree.split({"progress": [step], "m": torch.ones(3)} if state is None else state),
            rank_state=tree.split(rank_state or {"rng": torch.arange(4)}),
            metrics={"eval/loss": step + 0.25},
        )
        staged = Stage(rank).take(content, range(size))
    writing.write(folder, staged, comm, is_main=rank == 0, then=lambda: None)
    return files.place(folder, step)[0]
