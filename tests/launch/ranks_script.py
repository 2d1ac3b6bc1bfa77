"""What tests of `dtrain ablate --ranks` train: a script with habits, which its arguments name."""

import argparse
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import EMA, Checkpoint, EarlyStopping


class Odd(dtrain.Callback):
    """Does to the last rank what ``what`` says, at a step; killed it is only once."""

    def __init__(self, at=None, what=""):
        self.at, self.what = at, what

    def on_step_end(self, ctx, step):
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if step.number != self.at or int(os.environ.get("RANK", "0")) != size - 1:
            return
        if self.what == "kill" and not (gone := ctx.run_dir / "killed").exists():
            gone.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)


parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=3)
parser.add_argument("--habits", nargs="*", default=[])
given = parser.parse_args()
habits = given.habits


def make_model():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))


if "model-first" in habits:
    model = make_model()
if "no-init" not in habits:
    dtrain.init(seed=given.seed, timeout_s=8)
if "manual-seed" in habits:
    torch.manual_seed(0)
if "chdir" in habits:
    Path("elsewhere").mkdir(exist_ok=True)
    os.chdir("elsewhere")
if "prints" in habits:
    for _ in range(20000):
        print("x" * 80)
if "model-first" not in habits:
    model = make_model()
more = {}
if "trainer-seed" in habits:
    more["seed"] = 7
if "sinks" in habits:
    more["sinks"] = [dtrain.sinks.JSONLines()]
x = torch.randn(80, 6, generator=torch.Generator().manual_seed(5))
data = TensorDataset(x)
fit = {"eval_set": {"a": data, "b": TensorDataset(x[:40])} if "evals" in habits else data}
if "must" in habits:
    fit["resume"] = "must"
if "never" in habits:
    fit["resume"] = "never"
if "override" in habits:
    fit["override"] = {"lr": 0.003}
callbacks = [EMA(0.9), Odd(), Checkpoint(every_steps=5)]
if "early" in habits:
    name = "eval/a/loss" if "evals" in habits else "eval/loss"
    callbacks.append(EarlyStopping(name, mode="min", patience=1, restore_best=True))
trainer = dtrain.Trainer(
    model,
    torch.optim.AdamW(model.parameters(), lr=1e-2),
    lambda model, batch: (model(batch[0]) - batch[0].sum(1, True)).square().mean(),
    callbacks=callbacks,
    run_dir="runs/own",
    **more,
)
if "workers" in habits:
    trainer.fit(dtrain.Data(data, batch_size=8, num_workers=2), epochs=2, **fit)
else:
    trainer.fit(data, batch_size=8, epochs=2, **fit)
if "removes" in habits:
    import shutil

    shutil.rmtree(trainer.context.run_dir)
if "exit" in habits:
    sys.exit(0)
if "_exit" in habits:
    os._exit(0)
