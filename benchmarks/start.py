"""How long a script takes to its first step: with dtrain, and written by hand.

    python benchmarks/start.py

examples/digits.py and examples/plain_ddp.py do the same training, each as one process. Both are
started in turn, in random order, and end right after their first optimizer step; what is compared
is the time from the process's start to there, Python's and torch's imports included.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lane import compare

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = {"dtrain": "digits.py", "by hand": "plain_ddp.py"}

#: Runs a script as __main__, and ends the process after its first optimizer step.
UNTIL_FIRST_STEP = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

register_optimizer_step_post_hook(lambda *_: os._exit(0))
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
os._exit(1)  # it took no step
"""


def seconds_to_first_step(script: str, folder: str) -> float:
    command = [sys.executable, "-c", UNTIL_FIRST_STEP, str(EXAMPLES / script)]
    command += ["--run-dir", folder] if script == "digits.py" else []
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in SCRIPTS}
    for number in range(-1, arguments.rounds):  # once to have files in memory
        for name in random.sample(list(SCRIPTS), len(SCRIPTS)):
            with tempfile.TemporaryDirectory() as folder:
                took = seconds_to_first_step(SCRIPTS[name], folder + "/run")
            if number >= 0:
                seconds[name].append(took)
    found = compare(seconds["dtrain"], seconds["by hand"])
    low, high = found["interval"]
    print(f"to the first step: {found['ratio']:.3f} ({low:.3f} to {high:.3f}) times by hand")
    print({name: f"{statistics.median(took):.2f} s" for name, took in seconds.items()})


if __name__ == "__main__":
    main()
