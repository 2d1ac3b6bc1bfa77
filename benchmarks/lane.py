"""What the lane costs: a hand-written DDP step, with and without what ranks tell one another.

    launch/torchrun.sh benchmarks/lane.py                        # RANKS=2 unless set
    RANKS=4 launch/torchrun.sh benchmarks/lane.py --workload gpt --rounds 100 --block 1

All variants live in the same processes and take turns in blocks of steps, in an order drawn
anew for each round; a figure is the median, over rounds, of a variant's median step over that of
the plain loop in the same round, and the interval that this median lies in with 95 % confidence.
Blocks are short, so that the machine is equally busy for all variants of a round. Beside it stands
the ratio of the fastest tenths of all blocks, which other processes disturb least. Batches are
made beforehand: a step is forward, backward with its reduction, clipping and the optimizer,
nothing else.

- plain: DistributedDataParallel, every rank's mean loss weighing the same; the loss is not known
  on other ranks.
- lane: the same with dtrain's lane: the loss and its weight, and all votes, known on every rank.
- again: the plain loop once more; how far it is from 1 is what the figures can be trusted to.
- explicit: the same knowledge by an asynchronous all-reduce of as many floats, begun in the
  forward and waited for after backward.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import dtrain
from dtrain.step.lane import Lane, Slot


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


class GPT(nn.Module):
    """About a million parameters: 4 layers of width 144, 256 tokens, a context of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, 144), nn.Embedding(64, 144)
        layer = nn.TransformerEncoderLayer(144, 4, 576, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(144, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(x) + self.places.weight
        return self.head(self.layers(hidden, mask=self.mask)).transpose(1, 2)


def batches(workload: str, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if workload == "mlp":
        return [(torch.randn(16, 64), torch.randint(10, (16,))) for _ in range(count)]
    return [(torch.randint(256, (8, 64)), torch.randint(256, (8, 64))) for _ in range(count)]


class Plain:
    """The loop that one would write."""

    def __init__(self, make: type[nn.Module]) -> None:
        torch.manual_seed(0)
        self.module = self.wrap(make())
        self.ddp = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
        self.parameters = list(self.module.parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def wrap(self, model: nn.Module) -> nn.Module:
        self.model = model
        return _Loss(model)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(x, y)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def backward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.ddp(x, y).backward()


class _Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(x), y)


class WithLane(Plain):
    """The same, and every rank knows the global loss, its weight and all votes."""

    def wrap(self, model: nn.Module) -> nn.Module:
        self.model = model
        self.lane = Lane(model, rank=dist.get_rank(), size=dist.get_world_size())
        return _LossAndLane(model, self.lane)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.lane.open()
        super().step(x, y)

    def backward(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.lane.backward(*self.ddp(x, y))
        verdict = self.lane.listen().verdict()
        assert verdict.fed == dist.get_world_size()
        if verdict.factor != 1.0:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, verdict.factor)


class _LossAndLane(nn.Module):
    def __init__(self, model: nn.Module, lane: Lane) -> None:
        super().__init__()
        self.model = model
        self.lane_param = lane.param
        self.lane = lane

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        voice = self.lane.attach()
        self.lane.say(Slot.FED)
        if self.lane.reference == 1.0:
            self.lane.expect(len(y) * dist.get_world_size())
        loss = F.cross_entropy(self.model(x), y)
        return voice, self.lane.add(loss, len(y), len(y))


class Explicit(Plain):
    """The same knowledge by a reduction of its own."""

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.ddp(x, y)
        said = torch.zeros(len(Slot))
        said[Slot.LOSS], said[Slot.WEIGHT] = loss.detach() * len(y), len(y)
        work = dist.all_reduce(said, async_op=True)
        loss.backward()
        work.wait()
        heard = said.tolist()
        assert heard[Slot.WEIGHT] > 0
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


VARIANTS = {"plain": Plain, "again": Plain, "lane": WithLane, "explicit": Explicit}


def measure(workload: str, rounds: int, block: int) -> dict[str, list[float]]:
    """Returns the seconds of a median step, of each variant in each round."""
    loops = {name: kind(mlp if workload == "mlp" else GPT) for name, kind in VARIANTS.items()}
    data = batches(workload, block)
    names = list(loops)
    # Alike on all ranks. In a fixed order, a variant would always find what the same other left
    # in the caches.
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-10, rounds):  # ten rounds to warm up
        for name in order.sample(names, len(names)):
            dist.barrier()
            took = []
            for x, y in data:
                begin = time.perf_counter()
                loops[name].step(x, y)
                took.append(time.perf_counter() - begin)
            if number >= 0:
                seconds[name].append(statistics.median(took))
    return seconds


def compare(times: list[float], plain: list[float]) -> dict[str, Any]:
    """Returns how a variant's times relate to the plain loop's."""
    ratios = sorted(t / p for t, p in zip(times, plain, strict=True))
    # Of how many of n ratios lie below the true median, the standard deviation is sqrt(n) / 2.
    middle, reach = len(ratios) / 2, 0.98 * math.sqrt(len(ratios))
    fastest, plain_fastest = (
        statistics.quantiles(times, n=10)[0],
        statistics.quantiles(plain, n=10)[0],
    )
    return {
        "ratio": statistics.median(ratios),
        "interval": [
            ratios[max(0, int(middle - reach))],
            ratios[min(len(ratios) - 1, int(middle + reach))],
        ],
        "fastest_tenth": fastest / plain_fastest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=["mlp", "gpt"], default="mlp")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--block", type=int, default=5, help="steps of a variant at a time")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with dtrain.init(seed=0) as world:
        torch.set_num_threads(1)
        seconds = measure(arguments.workload, arguments.rounds, arguments.block)
        if not world.is_main:
            return
        found = {name: compare(times, seconds["plain"]) for name, times in seconds.items()}
        if arguments.json:
            print(json.dumps({"workload": arguments.workload, "ranks": world.size} | found))
            return
        print(f"{arguments.workload}, {world.size} ranks, {arguments.rounds} rounds")
        print(f"{'':9} median  (95 %)            fastest tenth")
        for name, one in found.items():
            low, high = one["interval"]
            interval = f"({low:.3f} to {high:.3f})"
            print(f"{name:9} {one['ratio']:.3f}   {interval}  {one['fastest_tenth']:.3f}")


if __name__ == "__main__":
    main()
