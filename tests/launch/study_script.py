"""What tests of `dtrain ablate` train: milliseconds long, with one tweak of each kind.

Where there is a file `fuse` beside the run with a number, so many steps later the process whose
number is in `pid` is killed.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain import Callback
from dtrain.callbacks import Checkpoint, ClipGradients


class Needed(Callback):
    """Brings the inputs to where they can be learnt from, and are evaluated."""

    def on_batch(self, ctx, step):
        x, y = step.batch
        step.batch = x / 300 - 2, y


class Harmful(Callback):
    """Pulls the weights away from where they should be."""

    def __init__(self, size=0.3):
        self.size = size

    def on_grads_ready(self, ctx, step):
        for grad in ctx.gradients():
            grad.add_(self.size)


class Useless(Callback):
    """Draws a number, so that dropout draws others: noise, and nothing else."""

    def on_step_start(self, ctx, step):
        torch.rand(1)


class Fuse(Callback):
    def on_step_end(self, ctx, step):
        fuse = Path("fuse")
        if fuse.exists():
            left = int(fuse.read_text()) - 1
            fuse.write_text(str(left))
            if left == 0:
                fuse.unlink()
                os.kill(int(Path("pid").read_text()), signal.SIGKILL)


def main():
    dtrain.init(seed=0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(240, 8, generator=generator)
    y = x @ torch.randn(8, 1, generator=generator) + 0.3 * torch.randn(240, 1, generator=generator)
    train = TensorDataset(300 * (x[:160] + 2), y[:160])
    val = TensorDataset(x[160:], y[160:])
    model = nn.Sequential(nn.Dropout(0.02), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss_fn(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    callbacks = [
        Needed(),
        Harmful(),
        Useless(),
        ClipGradients(5.0),
        Checkpoint(every_steps=7),
        Fuse(),
    ]
    trainer = dtrain.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05),
        loss_fn,
        callbacks=callbacks,
        sinks=[],
        run_dir="runs/own",
    )
    trainer.fit(train, batch_size=16, epochs=int(sys.argv[1]) if sys.argv[1:] else 4, eval_set=val)
    with Path("ends").open("a") as ends:
        ends.write(f"{trainer.context.run_dir}\n")


if __name__ == "__main__":
    main()
