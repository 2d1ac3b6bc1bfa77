"""Which strategy is quicker: one flat reduction after backward, or DDP's buckets during it?

    RANKS=2 launch/torchrun.sh benchmarks/strategies.py
    RANKS=4 launch/torchrun.sh benchmarks/strategies.py --megabytes 0.1 1 5

For each size of an MLP's parameters, two trainings live in the same processes and take turns in
random order, a few steps at a time. A figure is the median, over rounds, of the ratio of median
steps within a round, with the interval that this median lies in with 95 % confidence. Fused AdamW
and clipping, 16 samples a rank.
"""

from __future__ import annotations

import argparse
import math
import random

import torch
from control import Times, loss_fn
from lane import compare
from torch import nn

import dtrain
from dtrain.callbacks import ClipGradients

MEGABYTES = [0.1, 0.5, 1, 2, 5, 10, 25, 50, 100]


def mlp(megabytes: float) -> nn.Module:
    """Three layers, with so many bytes of parameters."""
    width = round(-37 + math.sqrt(37**2 + megabytes * 1e6 / 4))
    wide = nn.Linear(width, width)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), wide, nn.ReLU(), nn.Linear(width, 10))


class Training:
    """A Trainer that takes a few more steps at a time."""

    def __init__(self, strategy: str, megabytes: float, world: dtrain.World) -> None:
        torch.manual_seed(0)
        model = mlp(megabytes)
        self.times = Times()
        self.trainer = dtrain.Trainer(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
            loss_fn,
            callbacks=[ClipGradients(1.0), self.times],
            sinks=[],
            strategy=strategy,
        )
        rows = 16 * world.size * 10
        self.data = torch.utils.data.TensorDataset(
            torch.randn(rows, 64), torch.randint(10, (rows,))
        )
        self.batch_size = 16 * world.size

    def median_step(self, steps: int) -> float:
        """Takes some steps; returns the seconds of a median one."""
        done = self.trainer.context.progress.step
        self.trainer.fit(
            self.data, batch_size=self.batch_size, max_steps=done + steps, log_every=steps
        )
        return sorted(self.times.seconds)[len(self.times.seconds) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=MEGABYTES)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with dtrain.init(seed=0) as world:
        torch.set_num_threads(1)
        if world.is_main:
            print(f"flat against ddp, {world.size} ranks, {arguments.rounds} rounds")
        for megabytes in arguments.megabytes:
            trainings = {name: Training(name, megabytes, world) for name in ("ddp", "flat")}
            steps = 30 if megabytes < 5 else 10
            seconds: dict[str, list[float]] = {name: [] for name in trainings}
            order = random.Random(0)  # alike on all ranks
            for number in range(-2, arguments.rounds):  # two rounds to warm up
                for name in order.sample(list(trainings), len(trainings)):
                    took = trainings[name].median_step(steps)
                    if number >= 0:
                        seconds[name].append(took)
            if world.is_main:
                one = compare(seconds["flat"], seconds["ddp"])
                low, high = one["interval"]
                step_ms = 1e3 * sorted(seconds["ddp"])[len(seconds["ddp"]) // 2]
                print(
                    f"{megabytes:6.1f} MB: {one['ratio']:.3f} ({low:.3f} to {high:.3f}), fastest "
                    f"tenth {one['fastest_tenth']:.3f}; a step of ddp takes {step_ms:.2f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    main()
