"""How long a script takes to its first step: with dtrain, and written by hand.

    python benchmarks/start.py
    python benchmarks/start.py --parts
    python benchmarks/start.py --trials COMMIT [--slow-ms 3]

examples/digits.py and examples/plain_ddp.py do the same training, each as one process. Both are
started in turn, in random order, and end right after their first optimizer step; what is compared
is the time from the process's start to there, Python's and torch's imports included.

--parts says where the time of examples/digits.py goes. --trials has `dtrain check` and
`dtrain drill` run it, in turn here and at another commit; --slow-ms makes the import of each
module's file take so much longer, as it does where files are far away.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
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


#: Runs examples/digits.py up to its first step, and prints when it came to what.
PARTS = """
import os, runpy, sys, time
told = [("Python", float(sys.argv.pop(1)))]
told.append(("import torch", time.time()))
import torch
told.append(("import dtrain, beside torch", time.time()))
import dtrain.api
told.append(("import torch._dynamo, for the first optimizer", time.time()))
import torch._dynamo
told.append(("the script's other imports", time.time()))
import sklearn.datasets
told.append(("the script, to its first step", time.time()))
from torch.optim.optimizer import register_optimizer_step_post_hook

def leave(*_):
    told.append(("", time.time()))
    for (what, began), (_, ended) in zip(told, told[1:]):
        print(f"{what}\t{ended - began}")
    sys.stdout.flush()
    os._exit(0)

register_optimizer_step_post_hook(leave)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def show_parts(rounds: int) -> None:
    found: dict[str, list[float]] = {}
    for number in range(-1, rounds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", PARTS, str(time.time()), str(EXAMPLES / "digits.py")]
            command += ["--run-dir", folder + "/run"]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for line in told.splitlines():
            what, _, seconds = line.rpartition("\t")
            if what and number >= 0:
                found.setdefault(what, []).append(float(seconds))
    medians = {what: statistics.median(took) for what, took in found.items()}
    for what, took in medians.items():
        print(f"{took / sum(medians.values()):4.0%} {took:7.2f} s  {what}")


#: Makes the import of each file take longer.
SLOW = """
import time
from importlib.machinery import ExtensionFileLoader, SourceFileLoader

for kind in (SourceFileLoader, ExtensionFileLoader):
    def later(self, module, load=kind.exec_module):
        time.sleep(float("{seconds}"))
        load(self, module)
    kind.exec_module = later
"""


def trial(tree: Path, command: str, slow: str) -> tuple[float, float]:
    """How long a command takes at a tree's commit, and how much of the CPUs, in seconds."""
    path = os.pathsep.join([str(tree), slow])
    words = [sys.executable, "-m", "dtrain", command, str(EXAMPLES / "digits.py")]
    used, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    env, quiet = os.environ | {"PYTHONPATH": path}, subprocess.DEVNULL
    subprocess.run(words, cwd=tree, env=env, check=True, stdout=quiet, stderr=quiet)
    took, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def compare_trials(commit: str, rounds: int, slow_ms: float) -> None:
    here = EXAMPLES.parent
    with tempfile.TemporaryDirectory() as folder:
        before, slow = Path(folder) / "before", ""
        if slow_ms:
            slow = folder
            text = SLOW.format(seconds=slow_ms / 1000)
            (Path(folder) / "sitecustomize.py").write_text(text)
        git = ["git", "-C", str(here), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", "-f", str(before), commit], check=True)
        try:
            for command in ("check", "drill"):
                took: dict[Path, list[float]] = {before: [], here: []}
                used: dict[Path, list[float]] = {before: [], here: []}
                for _ in range(rounds):
                    for tree in random.sample([before, here], 2):
                        wall, cpu = trial(tree, command, slow)
                        took[tree].append(wall)
                        used[tree].append(cpu)
                found = compare(took[here], took[before])
                low, high = found["interval"]
                was, now = (statistics.median(took[tree]) for tree in (before, here))
                cpu_was, cpu_now = (statistics.median(used[tree]) for tree in (before, here))
                print(
                    f"dtrain {command}: {found['ratio']:.2f} ({low:.2f} to {high:.2f}) times "
                    f"{commit}'s; {was:.1f} and {now:.1f} s, of CPUs {cpu_was:.1f} and "
                    f"{cpu_now:.1f} s",
                    flush=True,
                )
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="2 or more (%(default)s)")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--trials", metavar="COMMIT")
    parser.add_argument("--slow-ms", type=float, default=0.0)
    arguments = parser.parse_args()
    if arguments.parts:
        show_parts(arguments.rounds)
        return
    if arguments.trials:
        compare_trials(arguments.trials, arguments.rounds, arguments.slow_ms)
        return
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
