"""A step of a sharded model against the same by hand, with torch's fully_shard.

    RANKS=2 launch/torchrun.sh benchmarks/sharded.py
    RANKS=2 launch/torchrun.sh benchmarks/sharded.py --millions 100 --rounds 3 --steps 2

A transformer of equal blocks, each of which is sharded, and then the rest, as torchtitan does it;
fused AdamW, clipped by the joint norm, float32. Both live in the same processes and take turns in
random order, a few steps at a time. A figure is the median, over rounds, of the ratio of median
steps within a round, with the interval that this median lies in with 95 % confidence. The loop by
hand reads no loss. What a rank holds is counted from its tensors.
"""

from __future__ import annotations

import argparse
import random
import statistics

import torch
import torch.distributed as dist
from control import Times, endless, median_step
from lane import compare
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dtrain
from dtrain.callbacks import ClipGradients
from dtrain.strategies import FSDP

BATCH, CONTEXT, VOCABULARY, LAYERS = 4, 32, 256, 6


class Transformer(nn.Module):
    """Of so many million parameters, nearly all of them in equal blocks."""

    def __init__(self, millions: float, layers: int = LAYERS) -> None:
        super().__init__()
        heads = 4
        width = max(8, round((millions * 1e6 / layers / 12) ** 0.5 / heads) * heads)
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


class ByHand:
    """As people write it."""

    def __init__(self, millions: float, data: TensorDataset) -> None:
        torch.manual_seed(0)
        self.model = Transformer(millions)
        # A group as torch opens it: dtrain's has threads that leave cores to others.
        mesh = DeviceMesh.from_group(dist.new_group(backend="gloo"), "cpu")
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = optimizer_of(self.model)
        loader = DataLoader(data, BATCH, sampler=DistributedSampler(data), drop_last=True)
        self.batches = endless(loader)

    def median_step(self, steps: int) -> float:
        return median_step(self.step, self.batches, steps)

    def step(self, batch: list[Tensor]) -> None:
        loss_fn(self.model, batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Training:
    """A Trainer that takes a few more steps at a time."""

    def __init__(self, millions: float, data: TensorDataset, world: dtrain.World) -> None:
        torch.manual_seed(0)
        self.model = Transformer(millions)
        self.times = Times()
        self.trainer = dtrain.Trainer(
            self.model,
            optimizer_of,
            loss_fn,
            callbacks=[ClipGradients(1.0), self.times],
            sinks=[],
            strategy=FSDP(),
        )
        self.data, self.batch_size = data, BATCH * world.size

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.trainer.optimizer

    def median_step(self, steps: int) -> float:
        self.trainer.fit(self.data, batch_size=self.batch_size, max_steps=steps + 1, log_every=999)
        return statistics.median(self.times.seconds)


def held(training: ByHand | Training) -> int:
    """Counts the bytes of this rank's parameters and moments."""
    state = [one for held in training.optimizer.state.values() for one in held.values()]
    tensors = [*training.model.parameters(), *(t for t in state if isinstance(t, Tensor))]
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, nargs="+", default=[0.3, 5])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="at a time")
    arguments = parser.parse_args()
    with dtrain.init(seed=0) as world:
        torch.set_num_threads(1)
        if world.size == 1:
            parser.error("start it on several ranks: RANKS=2 launch/torchrun.sh ...")
        rows = BATCH * world.size * (arguments.steps + 1)
        tokens = torch.randint(VOCABULARY, (2, rows, CONTEXT))
        data = TensorDataset(tokens[0], tokens[1])
        for millions in arguments.millions:
            trainings = {
                "by hand": ByHand(millions, data),
                "dtrain": Training(millions, data, world),
            }
            seconds: dict[str, list[float]] = {name: [] for name in trainings}
            order = random.Random(0)  # alike on all ranks
            for number in range(-1, arguments.rounds):  # one round to warm up
                for name in order.sample(list(trainings), len(trainings)):
                    took = trainings[name].median_step(arguments.steps)
                    if number >= 0:
                        seconds[name].append(took)
            if world.is_main:
                count = sum(p.numel() for p in Transformer(millions).parameters())
                one = compare(seconds["dtrain"], seconds["by hand"])
                low, high = one["interval"]
                step_ms = 1e3 * statistics.median(seconds["by hand"])
                whole = 12 * count / world.size
                holds = {name: held(training) / whole for name, training in trainings.items()}
                print(
                    f"{count / 1e6:.1f} M parameters, {world.size} ranks: {one['ratio']:.3f} "
                    f"({low:.3f} to {high:.3f}), fastest tenth {one['fastest_tenth']:.3f}; a step "
                    f"by hand takes {step_ms:.1f} ms; of 12 bytes a parameter and rank, by hand "
                    f"holds {holds['by hand']:.3f}, dtrain {holds['dtrain']:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
