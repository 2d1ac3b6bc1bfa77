"""What it costs that gloo's threads push one another off a core (distributed/transport.py).

    RANKS=2 launch/torchrun.sh benchmarks/gloo_threads.py

Each rank computes for a while, then all reduce; over a group as torch opens it, and over one as
dtrain does. Both live in the same processes and take turns, in blocks of 50, in an order drawn anew
for each round. In microseconds, the computing included.
"""

from __future__ import annotations

import argparse
import random
from time import perf_counter

import torch
import torch.distributed as dist

import dtrain
from dtrain.distributed.transport import yielding_threads

BLOCK = 50


def compute(seconds: float) -> None:
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--floats", type=int, default=9000)
    parser.add_argument("--compute-us", type=float, default=400)
    arguments = parser.parse_args()
    with dtrain.init(seed=0) as world:
        buffer = torch.zeros(arguments.floats)
        groups = {"torch's": dist.new_group(backend="gloo")}
        with yielding_threads():
            groups["dtrain's"] = dist.new_group(backend="gloo")
        taken: dict[str, list[float]] = {name: [] for name in groups}
        order = random.Random(0)  # alike on all ranks
        for number in range(-2, arguments.rounds):  # two rounds to warm up
            for name in order.sample(list(groups), len(groups)):
                dist.barrier()
                for _ in range(BLOCK):
                    began = perf_counter()
                    compute(1e-6 * arguments.compute_us)
                    dist.all_reduce(buffer, group=groups[name])
                    if number >= 0:
                        taken[name].append(perf_counter() - began)
        if world.is_main:
            print("group     |  mean | median | 9 of 10 |")
            for name, seconds in taken.items():
                mean, ranked = sum(seconds) / len(seconds), sorted(seconds)
                figures = mean, ranked[len(ranked) // 2], ranked[9 * len(ranked) // 10]
                told = " | ".join(f"{1e6 * one:6.0f}" for one in figures)
                print(f"{name:9} | {told} |", flush=True)


if __name__ == "__main__":
    main()
