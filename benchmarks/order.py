"""What a shuffled order of samples costs: dtrain's permutation against torch's DistributedSampler.

    python benchmarks/order.py

Each case runs in a process of its own: it makes the order of an epoch for one rank of four, and
takes the first batch of 64 samples a rank, once from the start of an epoch and once from its middle
(as a resumed run does; with DistributedSampler, by skipping). Seconds are the median of some rounds
in which the cases take turns; memory is by how much the process's peak grew.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice

import torch
from torch.utils.data import Dataset, DistributedSampler

from dtrain.data import Shuffled

RANKS, BATCH = 4, 64


class Numbers(Dataset[int]):
    """So many samples, and nothing in them."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length


def sampler(length: int, first_step: int) -> list[int]:
    """Torch's, as it is used by hand."""
    order: DistributedSampler[int] = DistributedSampler(
        Numbers(length), RANKS, rank=1, shuffle=True, seed=0
    )
    order.set_epoch(3)
    return list(islice(iter(order), first_step * BATCH, (first_step + 1) * BATCH))


def permutation(length: int, first_step: int) -> list[int]:
    """dtrain's: rank 1's slice of a global batch."""
    first = first_step * BATCH * RANKS + BATCH
    rows: list[int] = Shuffled(length, seed=0).indices(3, first, first + BATCH).tolist()
    return rows


CASES: dict[str, Callable[[int, int], list[int]]] = {
    "DistributedSampler": sampler,
    "dtrain": permutation,
}


def measure(case: str, length: int, middle: bool) -> tuple[float, float]:
    """Returns the seconds to the first batch, and by how many MiB the peak grew; run alone."""
    CASES[case](1000, 0)  # imports, and the first call of everything
    torch.set_num_threads(1)
    first_step = length // (RANKS * BATCH) // 2 if middle else 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    rows = CASES[case](length, first_step)
    seconds = time.perf_counter() - began
    assert len(set(rows)) == BATCH
    grew = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return seconds, grew / 1024  # Linux counts it in KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", nargs=3, metavar=("CASE", "LENGTH", "MIDDLE"), help="(a case)")
    arguments = parser.parse_args()
    if arguments.alone:
        case, length, middle = arguments.alone
        print(json.dumps(measure(case, int(length), middle == "True")))
        return
    cases = [(case, 10**power) for power in (6, 7) for case in CASES] + [("dtrain", 10**9)]
    found: dict[tuple[str, int, bool], list[tuple[float, float]]] = {}
    for _ in range(arguments.rounds):
        for case, length in cases:
            for middle in (False, True):
                command = [sys.executable, __file__, "--alone", case, str(length), str(middle)]
                told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                seconds, grew = json.loads(told)
                found.setdefault((case, length, middle), []).append((seconds, grew))
    print(f"{'':20} {'samples':>13}  {'begins':14} {'to first batch':>14}  memory")
    for (case, length, middle), results in found.items():
        seconds = statistics.median(s for s, _ in results)
        grew = statistics.median(g for _, g in results)
        where = "in the middle" if middle else "at the start"
        print(f"{case:20} {length:13,}  {where:14} {seconds * 1e3:11.2f} ms  {grew:.1f} MiB")


if __name__ == "__main__":
    main()
