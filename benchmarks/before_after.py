"""Whether a step costs what it did at another commit: both trees in turn, in the same noise.

    python benchmarks/before_after.py COMMIT [--ranks 1 2] [--pairs 12] [--json]

Each turn is a whole run of that tree's own overhead.py, whose figure is dtrain's step relative
to a tuned hand-written loop in the same process. Printed is the median of after over before,
with a 95 % interval (bootstrap over pairs).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def measure(tree: Path, ranks: int, workload: str) -> float:
    """dtrain's step relative to the tuned loop's, in one run of a tree's benchmark."""
    command = [sys.executable, "benchmarks/overhead.py", "--loops", "dtrain", "--json"]
    command += ["--ranks", str(ranks), "--workload", workload]
    done = subprocess.run(
        command,
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    last = json.loads(done.stdout.strip().splitlines()[-1])
    ratio: float = last["to_tuned"]["ratio"]
    return ratio


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the medians of samples drawn from these with replacement."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(4000))
    return medians[100], medians[-101]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", help="the commit before")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--workload", default="mlp", choices=["mlp", "cnn", "gpt"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "-f", str(before), options.commit], check=True)
        try:
            for ranks in options.ranks:
                ratios = []
                for pair in range(options.pairs):
                    trees = [before, ROOT] if pair % 2 else [ROOT, before]
                    took = {tree: measure(tree, ranks, options.workload) for tree in trees}
                    ratios.append(took[ROOT] / took[before])
                low, high = interval(ratios)
                found[ranks] = {"ratio": statistics.median(ratios), "interval": [low, high]}
                if not options.json:
                    print(
                        f"{options.workload}, {ranks} rank(s): {found[ranks]['ratio']:.3f} of "
                        f"{options.commit} ({low:.3f} to {high:.3f}, {options.pairs} pairs)",
                        flush=True,
                    )
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
