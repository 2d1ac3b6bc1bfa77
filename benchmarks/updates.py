"""A step of two updates against the same by hand, with two DistributedDataParallel modules.

    RANKS=2 launch/torchrun.sh benchmarks/updates.py
    RANKS=2 launch/torchrun.sh benchmarks/updates.py --megabytes 0.1 1 5 --strategy ddp

A GAN of two MLPs: the critic learns from real and fake samples, then the generator from the same
fakes and the new critic; both are clipped, by fused AdamW, 16 samples a rank. Both live in the
same processes and take turns in random order, a few steps at a time. A figure is the median, over
rounds, of the ratio of median steps within a round, with the interval that this median lies in with
95 % confidence. The loop by hand reads no loss, and clips by norm as torch does.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics

import torch
import torch.distributed as dist
from control import Times, endless, median_step
from lane import compare
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dtrain
from dtrain.callbacks import ClipGradients

FEATURES, BATCH = 64, 16
VIEWS = {"gradient_as_bucket_view": True}


def networks(megabytes: float) -> nn.ModuleDict:
    """Two networks of three layers, of so many bytes together."""
    torch.manual_seed(0)
    width = round(-64 + math.sqrt(64**2 + megabytes * 1e6 / 8))
    made = {}
    for name, outputs in (("generator", FEATURES), ("critic", 1)):
        first, wide = nn.Linear(FEATURES, width), nn.Linear(width, width)
        made[name] = nn.Sequential(first, nn.ReLU(), wide, nn.ReLU(), nn.Linear(width, outputs))
    return nn.ModuleDict(made)


def optimizers(nets: nn.ModuleDict) -> dict[str, torch.optim.Optimizer]:
    return {
        name: torch.optim.AdamW(nets[name].parameters(), lr=1e-4, fused=True)
        for name in ("critic", "generator")
    }


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    scores = critic(torch.cat([real, fake]))
    return F.softplus(-scores[: len(real)]).mean() + F.softplus(scores[len(real) :]).mean()


class ByHand:
    """Two modules in DistributedDataParallel, as people write it."""

    def __init__(self, megabytes: float, data: TensorDataset, world: dtrain.World) -> None:
        self.nets = networks(megabytes)
        self.optimizers = optimizers(self.nets)
        several = world.size > 1
        # A group as torch opens it: dtrain's has threads that leave cores to others.
        group = dist.new_group(backend="gloo") if several else None
        self.critic, self.generator = (
            DistributedDataParallel(self.nets[name], None, process_group=group, **VIEWS)
            if several
            else self.nets[name]
            for name in ("critic", "generator")
        )
        sampler = DistributedSampler(data) if several else None
        loader = DataLoader(data, BATCH, sampler=sampler, shuffle=not several, drop_last=True)
        self.batches = endless(loader)

    def median_step(self, steps: int) -> float:
        return median_step(self.step, self.batches, steps)

    def step(self, batch: list[Tensor]) -> None:
        real, noise = batch
        fake = self.generator(noise)
        self.optimizers["critic"].zero_grad()
        critic_loss(self.critic, real, fake.detach()).backward()
        nn.utils.clip_grad_norm_(self.nets["critic"].parameters(), 1.0)
        self.optimizers["critic"].step()
        self.nets["critic"].requires_grad_(False)
        self.optimizers["generator"].zero_grad()
        F.softplus(-self.nets["critic"](fake)).mean().backward()
        nn.utils.clip_grad_norm_(self.nets["generator"].parameters(), 1.0)
        self.optimizers["generator"].step()
        self.nets["critic"].requires_grad_(True)


def loss_fn(nets: nn.ModuleDict, batch: tuple[Tensor, Tensor]):
    real, noise = batch
    fake = nets["generator"](noise)
    yield "critic", critic_loss(nets["critic"], real, fake.detach())
    yield "generator", F.softplus(-nets["critic"](fake)).mean()


class Training:
    """A Trainer that takes a few more steps at a time."""

    def __init__(
        self, megabytes: float, data: TensorDataset, world: dtrain.World, strategy: str
    ) -> None:
        nets = networks(megabytes)
        self.times = Times()
        callbacks = [ClipGradients(1.0), self.times]
        made = optimizers(nets)
        self.trainer = dtrain.Trainer(
            nets, made, loss_fn, callbacks=callbacks, sinks=[], strategy=strategy
        )
        self.data, self.batch_size = data, BATCH * world.size

    def median_step(self, steps: int) -> float:
        done = self.trainer.context.progress.step
        self.trainer.fit(
            self.data, batch_size=self.batch_size, max_steps=done + steps, log_every=steps
        )
        return statistics.median(self.times.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[0.1, 1])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--strategy", default="auto")
    arguments = parser.parse_args()
    with dtrain.init(seed=0) as world:
        torch.set_num_threads(1)
        rows = BATCH * world.size * 40
        data = TensorDataset(torch.randn(rows, FEATURES), torch.randn(rows, FEATURES))
        for megabytes in arguments.megabytes:
            trainings = {
                "by hand": ByHand(megabytes, data, world),
                "dtrain": Training(megabytes, data, world, arguments.strategy),
            }
            seconds: dict[str, list[float]] = {name: [] for name in trainings}
            order = random.Random(0)  # alike on all ranks
            for number in range(-2, arguments.rounds):  # two rounds to warm up
                for name in order.sample(list(trainings), len(trainings)):
                    took = trainings[name].median_step(30)
                    if number >= 0:
                        seconds[name].append(took)
            if world.is_main:
                one = compare(seconds["dtrain"], seconds["by hand"])
                low, high = one["interval"]
                step_ms = 1e3 * statistics.median(seconds["by hand"])
                print(
                    f"{megabytes:5.1f} MB, {world.size} ranks, {arguments.strategy}: "
                    f"{one['ratio']:.3f} ({low:.3f} to {high:.3f}), fastest tenth "
                    f"{one['fastest_tenth']:.3f}; a step by hand takes {step_ms:.2f} ms",
                    flush=True,
                )


if __name__ == "__main__":
    main()
