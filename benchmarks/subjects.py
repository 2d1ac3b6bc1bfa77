"""dtrain's loop, as its guide recommends it, for benchmarks/overhead.py."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LinearLR
from turns import Turns
from workloads import Workload, loss_of

import dtrain
from dtrain.callbacks import Checkpoint, ClipGradients, EarlyStopping, LRSchedule, NonFiniteGuard
from dtrain.sinks import JSONLines


class TakesTurns(dtrain.Callback):
    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_step_end(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        self.turns.step_is_over()


def train(workload: Workload, turns: Turns, folder: Any, *, fused: bool, strategy: str) -> None:
    """Clip, schedule, metrics, JSONLines, EarlyStopping, NonFiniteGuard and Checkpoint are on."""
    with dtrain.init(seed=0) as world:
        model = workload.model()
        trainer = dtrain.Trainer(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused or None),
            loss_of,
            callbacks=[
                ClipGradients(1.0),
                LRSchedule(lambda opt, steps: LinearLR(opt, total_iters=1000), every="step"),
                EarlyStopping("eval/loss", mode="min", patience=3),
                Checkpoint(every_epochs=1),
                NonFiniteGuard(),
                TakesTurns(turns),
            ],
            sinks=[JSONLines()],
            run_dir=folder / "dtrain",
            strategy=strategy,
        )
        trainer.fit(
            turns.dataset(),
            batch_size=workload.micro_batch_size * world.size,
            epochs=1,
            eval_set=workload.dataset(2, world.size),
            log_every=workload.block,
        )
