"""What dtrain costs as ranks are added: real ones on this machine, and its parts in larger worlds.

    python benchmarks/scale.py                                  # all of it, some minutes
    python benchmarks/scale.py --ranks 1 2 4 --parts            # real ranks only
    python benchmarks/scale.py --ranks --parts 1024 16384       # parts only
    python benchmarks/scale.py --ranks 64 --results FILE        # keeps figures in FILE, shows all

Real ranks: a tiny model is trained by a hand-written DDP loop and by dtrain, in the same processes,
which take turns (benchmarks/scale_ranks.py). With more ranks than cores such a step is mostly the
scheduler's, for both loops; what can be read off are ratios, memory, files, and what a verb or a
start costs as ranks are added.

Parts: one rank's end of each part, at a world size that is simulated (benchmarks/scale_parts.py).
What travels on a network is counted, not timed.

A law is fitted as an exponent: figures grow as W to its power, from the least squares of their
logarithms. What has a constant part shows less than it would come to; so it is fitted to the upper
half of the world sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scale_parts
import scale_ranks
import torch
from lane import compare

from dtrain.testing import run_processes

RANKS = [1, 2, 4, 8, 16, 32, 64]
PARTS = [1024, 2048, 4096, 8192, 16384]
MIB_A_RANK = 130  # beyond what processes share; of 24 GB, 64 ranks take 8

Figures = Mapping[str, Any]

#: What is expected to grow how, by a part's name; nothing else is expected to grow.
GROWS = {
    "lane: a count": "rounding",
    "lane: samples": "rounding",
    "lane: equal": "rounding",
    "comm: ": "O(W)",
    "stragglers: ": "O(W)",
    "epoch start: ": "O(W)",
    "checkpoint: plan": "O(1)",
    "checkpoint: shared parts": "O(1)",
    "checkpoint: ": "O(W)",
    "heartbeats: a post": "O(1)",
    "heartbeats: store's time": "O(1)",
    "heartbeats: if all": "O(W^2)",
    "heartbeats: ": "O(W)",
}


def of_ranks() -> dict[str, Callable[[Figures], float | None]]:
    """What is shown of real ranks, by its name."""

    def ms_of(one: Figures, loop: str) -> float | None:
        return 1e3 * statistics.median(one["seconds"][loop]) if "seconds" in one else None

    def ratio(one: Figures, loop: str) -> float | None:
        if "seconds" not in one:
            return None
        pairs = zip(one["seconds"][loop], one["seconds"]["plain"], strict=True)
        return statistics.median(ours / plain for ours, plain in pairs)

    def interval(one: Figures, end: int) -> float | None:
        # Of a few rounds, the interval is no more than all of them.
        if len(one.get("seconds", {"dtrain": ()})["dtrain"]) < 5:
            return None
        return compare(one["seconds"]["dtrain"], one["seconds"]["plain"])["interval"][end]

    def over(one: Figures, what: str, then: str, before: str) -> float:
        return one["held"][then][what] - one["held"][before][what]

    def ms(one: Figures, name: str) -> float | None:
        return 1e3 * one[name] if name in one else None

    return {
        "step: hand-written (ms)": lambda one: ms_of(one, "plain"),
        "step: dtrain (ms)": lambda one: ms_of(one, "dtrain"),
        "step: dtrain / hand-written": lambda one: ratio(one, "dtrain"),
        "step: ... 95 % from": lambda one: interval(one, 0),
        "step: ... 95 % to": lambda one: interval(one, 1),
        "step: again / hand-written": lambda one: ratio(one, "again"),
        "memory: bare process, RSS (MiB)": lambda one: one["held"]["bare"]["rss"],
        "memory: hand-written adds, RSS (MiB)": lambda one: over(one, "rss", "plain", "bare"),
        "memory: dtrain adds, RSS (MiB)": lambda one: over(one, "rss", "trainer", "plain"),
        "memory: dtrain adds, USS (MiB)": lambda one: over(one, "uss", "trainer", "plain"),
        "memory: with Checkpoint, USS (MiB)": lambda one: over(one, "uss", "saved", "plain"),
        "files: hand-written adds": lambda one: over(one, "files", "plain", "bare"),
        "files: dtrain adds": lambda one: over(one, "files", "trainer", "plain"),
        "files: Checkpoint adds": lambda one: over(one, "files", "saved", "trainer"),
        "start: torch's group (ms)": lambda one: ms(one, "torch_group_s"),
        "start: dtrain.init beside it (ms)": lambda one: ms(one, "init_s"),
        "start: Trainer(...) (ms)": lambda one: ms(one, "trainer_s"),
        "start: a later fit, 2 steps (ms)": lambda one: ms(one, "fit_s"),
        "verb: torch's barrier (ms)": lambda one: ms(one, "barrier_torch_s"),
        "verb: torch's all_reduce, 16 bytes (ms)": lambda one: ms(one, "all_reduce_torch_s"),
        "verb: comm.barrier, the header (ms)": lambda one: ms(one, "verb_s"),
        "verb: comm.gather_objects (ms)": lambda one: ms(one, "gather_objects_s"),
        "save: first fit with Checkpoint (ms)": lambda one: ms(one, "fit_and_save_s"),
        "save: files in a checkpoint": lambda one: one["saved_files"],
    }


def exponent(sizes: Sequence[int], values: Sequence[float | None]) -> float | None:
    """Returns the power of W that values grow with, in the upper half of the sizes."""
    known = [(w, v) for w, v in zip(sizes, values, strict=True) if v is not None and v > 0]
    known = known[-max(2, (len(sizes) + 2) // 2) :]
    if len(known) < 2:
        return None
    logs = np.log(np.array(known, dtype=np.float64))
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def table(sizes: Sequence[int], rows: Mapping[str, Sequence[float | None]], of: str) -> str:
    """Returns a table as Markdown has it, with the law of each row."""
    wide = max(map(len, rows))
    lines = [
        f"| {of:{wide}} | {' | '.join(f'{size:>8,}' for size in sizes)} | W to the power |",
        f"|{'-' * (wide + 2)}|{'|'.join(['---------:'] * len(sizes))}|---------------:|",
    ]
    for name, values in rows.items():
        law = exponent(sizes, values)
        cells = " | ".join(f"{_short(value):>8}" for value in values)
        told = "" if law is None else f"{law:+.2f}"
        expected = next((law for start, law in GROWS.items() if name.startswith(start)), "")
        if of.startswith("part"):
            told = f"{told}, {expected or 'O(1)'}" if told and expected != "rounding" else expected
        lines.append(f"| {name:{wide}} | {cells} | {told:>14} |")
    return "\n".join(lines)


def _short(value: float | None) -> str:
    if value is None:
        return ""
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _free_mib() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("MemAvailable"))


def run_ranks(
    sizes: Sequence[int], rounds: int, found: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Measures real ranks, as many as fit into memory."""
    for size in sizes:
        if (need := 600 + size * MIB_A_RANK) > (free := _free_mib()):
            print(f"{size} ranks left out: they take {need} MiB, {free} are free", file=sys.stderr)
            continue
        steps = max(5, min(40, 160 // size))
        ranks = run_processes(scale_ranks.measure, size, rounds, steps, timeout_s=600)
        found["ranks"][str(size)] = ranks[0] | {"cores": os.cpu_count()}
        keep()
        print(f"{size} ranks measured", file=sys.stderr)


def run_parts(sizes: Sequence[int], found: dict[str, Any], keep: Callable[[], None]) -> None:
    """Measures parts at simulated world sizes."""
    if not sizes:
        return
    with scale_parts.served_store() as (port, pid):
        scale_parts.use_store(port, pid)
        for size in sizes:
            found["parts"][str(size)] = scale_parts.everything(size)
            keep()
            print(f"parts at {size} ranks measured", file=sys.stderr)


def show(found: dict[str, Any]) -> None:
    """Prints what was found."""
    if found["ranks"]:
        sizes = sorted(map(int, found["ranks"]))
        figures = [found["ranks"][str(size)] for size in sizes]
        rows = {name: [of(one) for one in figures] for name, of in of_ranks().items()}
        cores = figures[0]["cores"]
        print(table(sizes, rows, "real ranks, of rank 0"))
        print(
            f"\n{cores} cores. Beyond {cores} ranks, times are mostly the scheduler's, of both "
            "loops: read their ratio, memory and files.\n"
        )
    if found["parts"]:
        sizes = sorted(map(int, found["parts"]))
        names = found["parts"][str(sizes[0])]
        rows = {name: [found["parts"][str(size)].get(name) for size in sizes] for name in names}
        print(table(sizes, rows, "part, simulated ranks"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS, help="real ones")
    parser.add_argument("--parts", type=int, nargs="*", default=PARTS, help="simulated worlds")
    parser.add_argument("--rounds", type=int, default=12, help="0: everything but steps")
    parser.add_argument("--results", type=Path, help="a JSON file that keeps earlier figures")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"ranks": {}, "parts": {}}
    if arguments.results is not None and arguments.results.exists():
        found = json.loads(arguments.results.read_text())

    def keep() -> None:
        if arguments.results is not None:
            arguments.results.parent.mkdir(parents=True, exist_ok=True)
            arguments.results.write_text(json.dumps(found, indent=1) + "\n")

    run_ranks(arguments.ranks, arguments.rounds, found, keep)
    run_parts(arguments.parts, found, keep)
    if arguments.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
