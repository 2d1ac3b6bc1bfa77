"""What the jobs of these tests train: a tiny model, in steps that are slow where they must be met.

slurm_train.py FOLDER SLOW_STARTS [raise]

Into FOLDER go `run` (run_dir); of each start and rank `pid-COUNT-RANK`, `start-COUNT-RANK`, with
the step it began at, `at-COUNT-RANK`, with a step that it has reached, and `end-COUNT-RANK`, with
the step it ended at and why; and `model-RANK.safetensors`, at the end. While FOLDER/slow is there,
steps are slow as well. STEPS and EVERY_STEPS in the environment are other numbers than 600 and 25.
"""

import os
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import Checkpoint

STEPS = int(os.environ.get("STEPS", "600"))
EVERY_STEPS = int(os.environ.get("EVERY_STEPS", "25"))  # a checkpoint
SLOW_STEP_S = 0.1

world = dtrain.init(seed=3)
folder, slow_starts, fails = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["raise"]
count = int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def note(what, words):
    aside = folder / f".{what}-{count}-{world.rank}"
    aside.write_text(str(words))
    aside.rename(folder / f"{what}-{count}-{world.rank}")  # a reader finds all of it


class Watched(dtrain.Callback):
    def on_fit_start(self, ctx):
        note("pid", os.getpid())
        note("start", ctx.progress.step)

    def on_step_end(self, ctx, step):
        if fails and step.number == 5:
            raise ValueError("planted")
        if step.number % EVERY_STEPS == 2:
            note("at", step.number)
        if count < slow_starts or (folder / "slow").exists():
            threading.Event().wait(SLOW_STEP_S)


x = torch.randn(48, 6, generator=torch.Generator().manual_seed(5))
model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
trainer = dtrain.Trainer(
    model,
    torch.optim.AdamW(model.parameters(), lr=1e-2),
    lambda model, batch: (model(batch[0]) - batch[0].sum(1, True)).square().mean(),
    callbacks=[Watched(), Checkpoint(every_steps=EVERY_STEPS)],
    sinks=[],
    run_dir=folder / "run",
)
result = trainer.fit(TensorDataset(x), batch_size=8, max_steps=STEPS)
if not result.preempted:
    save_file(model.state_dict(), folder / f"model-{world.rank}.safetensors")
note("end", f"{result.steps} {result.stop_reason}")
