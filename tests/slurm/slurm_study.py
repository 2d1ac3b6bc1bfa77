"""What tests of `dtrain ablate --slurm` train: 100 steps, slow while there is a file `slow`."""

import sys
import threading
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import EMA, Checkpoint


class Breaks(dtrain.Callback):
    """Fails at a step."""

    def __init__(self, at=None):
        self.at = at

    def on_step_end(self, ctx, step):
        if step.number > 12 and Path("slow").exists():
            threading.Event().wait(0.3)
        if step.number == self.at:
            raise ValueError(f"planted at {self.at}")


dtrain.init(seed=0)
assert sys.argv[1:] != ["--unknown"], "such an argument is unknown"
x = torch.randn(80, 6, generator=torch.Generator().manual_seed(5))
model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
trainer = dtrain.Trainer(
    model,
    torch.optim.AdamW(model.parameters(), lr=1e-2),
    lambda model, batch: (model(batch[0]) - batch[0].sum(1, True)).square().mean(),
    callbacks=[EMA(0.9), Breaks(), Checkpoint(every_steps=10)],
    run_dir="runs/own",
)
data = TensorDataset(x)
trainer.fit(data, batch_size=8, epochs=10, eval_set=data)
