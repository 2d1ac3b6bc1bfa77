"""How long a job under torchrun stands still when one of its ranks is killed.

    python benchmarks/restart.py

A rank sends itself SIGKILL; torchrun starts all ranks again; they go on from the last checkpoint.
From the kill to the first step after it, split into what happens on the way; seconds on the slowest
rank, the median of some jobs. Each job has one restart, and comes to its end: a kill burns one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOMENTS = ("killed", "started again", "imported", "met", "resumed", "next step done")

SCRIPT = """
import json, os, sys, time
told = {"started again": time.time()}
import torch
import torch._dynamo  # as the first optimizer does
from torch.utils.data import TensorDataset
import accelerate.state, accelerate.utils
import dtrain
from dtrain.callbacks import Checkpoint
told["imported"] = time.time()
world = dtrain.init(seed=0)
told["met"] = time.time()
again = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"


class Clock(dtrain.Callback):
    def on_epoch_start(self, ctx):
        told.setdefault("resumed", time.time())

    def on_step_end(self, ctx, step):
        if again and "next step done" not in told:
            told["next step done"] = time.time()
            with open(f"told-{world.rank}.json", "w") as file:
                json.dump(told, file)
        if not again and world.rank == 1 and ctx.progress.step == 30:
            with open("killed.json", "w") as file:
                json.dump(time.time(), file)
            os.kill(os.getpid(), 9)


model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
trainer = dtrain.Trainer(
    model,
    torch.optim.AdamW(model.parameters()),
    lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]),
    callbacks=[Checkpoint(every_steps=10), Clock()],
    sinks=[],
    run_dir="run",
)
data = TensorDataset(torch.randn(640, 64), torch.randint(10, (640,)))
assert trainer.fit(data, batch_size=16, epochs=1).steps == 40
"""


def job(ranks: int) -> dict[str, float]:
    """Returns the moments of one job, in seconds since its kill."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text(SCRIPT)
        subprocess.run(
            ["bash", str(ROOT / "launch" / "torchrun.sh"), "train.py"],
            cwd=folder,
            env=os.environ | {"RANKS": str(ranks), "RESTARTS": "1"},
            capture_output=True,
            check=True,
            timeout=120,
        )
        killed = json.loads(Path(folder, "killed.json").read_text())
        told = [json.loads(Path(folder, f"told-{rank}.json").read_text()) for rank in range(ranks)]
    return {"killed": 0.0} | {m: max(one[m] for one in told) - killed for m in MOMENTS[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [job(arguments.ranks) for _ in range(arguments.jobs)]
    print(f"{arguments.jobs} jobs on {arguments.ranks} ranks; median (least to most) seconds")
    for before, moment in pairwise(MOMENTS):
        show(f"{before} -> {moment}", [one[moment] - one[before] for one in jobs])
    show("killed -> next step done", [one["next step done"] for one in jobs])
    imports = [one["imported"] - one["started again"] for one in jobs]
    show(
        "  without the import",
        [one["next step done"] - i for one, i in zip(jobs, imports, strict=True)],
    )


def show(what: str, seconds: list[float]) -> None:
    print(f"{what:32} {statistics.median(seconds):6.2f} ({min(seconds):.2f} to {max(seconds):.2f})")


if __name__ == "__main__":
    main()
