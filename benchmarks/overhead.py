"""What a training loop costs, beside one that is written by hand.

    python benchmarks/overhead.py                              # 2 ranks, the MLP, dtrain
    python benchmarks/overhead.py --ranks 1 --loops dtrain dtrain-ddp dtrain-unfused
    python benchmarks/overhead.py --workload gpt --json
    python benchmarks/overhead.py --loops all --chart docs/overhead.svg

"all" are dtrain's and those of other frameworks (benchmarks/peers.py). These come with

    pip install -r benchmarks/requirements.txt -c constraints.txt .

in an environment of their own; one that is not installed is left out.

The work is the same for all: AdamW, clipping by norm, a learning rate that changes each step, and
the mean loss over ranks, logged once in a block of steps. A loop is compared with two handwritten
ones (benchmarks/handwritten.py): "plain" has torch's defaults, "tuned" every trick. The three live
in the same processes and take turns, a block at a time, the handwritten ones in an order drawn
anew for each round. A figure is the median, over rounds, of the ratio of a loop's block to the
handwritten one's of the same round, all that happens in it included; with the interval that this
median lies in with 95 % confidence.

Each rank gets its share of the cores for itself, as launchers on clusters bind them; with
--unbound, the system moves ranks about, and now and then puts two on one core.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DTRAIN = {
    "dtrain": {"fused": True, "strategy": "auto"},
    "dtrain-ddp": {"fused": True, "strategy": "ddp"},
    "dtrain-unfused": {"fused": False, "strategy": "auto"},
}
PEERS = {  # and what must be there to import
    "fabric": "lightning",
    "lightning": "lightning",
    "accelerate": "accelerate",
    "ignite": "ignite",
    "transformers": "transformers",
    "fastai": "fastai",
    "pytorch-accelerated": "pytorch_accelerated",
}
LOOPS = [*DTRAIN, *PEERS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--loops",
        nargs="+",
        choices=["all", *LOOPS],
        default=["dtrain"],
        metavar="LOOP",
        help=f"all, or some of {', '.join(LOOPS)}",
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="the default depends on the workload")
    parser.add_argument("--workload", choices=["mlp", "cnn", "gpt"], default="mlp")
    parser.add_argument("--unbound", action="store_true", help="do not bind ranks to cores")
    parser.add_argument("--json", action="store_true", help="print one JSON object a loop")
    parser.add_argument("--chart", type=Path, metavar="SVG", help="draw one")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds is not None and arguments.rounds < 2:
        parser.error("--rounds: at least 2")
    if arguments.worker:
        if not arguments.unbound:
            bind()
        work(arguments.loops[0], arguments.workload, arguments.rounds)
        return
    wanted, every = [], []
    for loop in LOOPS if "all" in arguments.loops else arguments.loops:
        if loop in PEERS and importlib.util.find_spec(PEERS[loop]) is None:
            how = "not installed (pip install -r benchmarks/requirements.txt)"
            print(f"{loop}: {how}", file=sys.stderr, flush=True)
            continue
        wanted.append(loop)
        found = measure(loop, arguments)
        if found is None:
            continue
        tell(found, as_json=arguments.json)
        every.append(found)
    if arguments.chart and every:
        from chart import draw

        arguments.chart.write_text(draw(every))
    if len(every) < len(wanted):
        sys.exit(1)


def measure(loop: str, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Runs the loop, under torchrun unless on one rank; returns what rank 0 found, if it did."""
    command = [sys.executable]
    if arguments.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={arguments.ranks}"]
    command += [__file__, "--worker", "--loops", loop]
    command += ["--workload", arguments.workload]
    command += ["--rounds", str(arguments.rounds)] if arguments.rounds else []
    command += ["--unbound"] if arguments.unbound else []
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"OMP_NUM_THREADS": "1", "OVERHEAD_FOLDER": folder}
        done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            print(f"{loop} failed with status {done.returncode}", file=sys.stderr, flush=True)
            return None
        found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
        return found


def bind() -> None:
    """Keeps this rank to its share of the cores; before torch is imported and starts threads."""
    if sys.platform != "linux":
        return
    rank, ranks = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    cores = sorted(os.sched_getaffinity(0))
    if 0 < ranks <= len(cores):
        each = len(cores) // ranks
        os.sched_setaffinity(0, cores[rank * each : (rank + 1) * each])


def work(loop: str, workload_name: str, rounds: int | None) -> None:
    """One rank."""
    import torch
    import torch.distributed.nn.functional  # later, it would keep the group beyond its end
    from lane import compare
    from turns import Turns
    from workloads import WORKLOADS

    torch.set_num_threads(1)
    folder = Path(os.environ["OVERHEAD_FOLDER"])
    workload = WORKLOADS[workload_name]
    turns = Turns(loop, workload, rounds or workload.rounds, folder)
    if loop in DTRAIN:
        from subjects import train

        train(workload, turns, folder, **DTRAIN[loop])
    else:
        from peers import PEERS as TRAIN

        TRAIN[loop](workload, turns, folder)
    turns.close()
    seconds = turns.seconds
    if len(seconds[loop]) != turns.rounds:
        raise SystemExit(f"{loop}: {len(seconds[loop])} turns instead of {turns.rounds}")
    if os.environ.get("RANK", "0") != "0":
        return
    found = {
        "loop": loop,
        "workload": workload_name,
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "rounds": turns.rounds,
        "to_plain": compare(seconds[loop], seconds["plain"]),
        "to_tuned": compare(seconds[loop], seconds["tuned"]),
        "tuned_to_plain": compare(seconds["tuned"], seconds["plain"]),
        "median_step_us": {
            name: round(1e6 * sorted(times)[len(times) // 2]) for name, times in seconds.items()
        },
    }
    (folder / "found.json").write_text(json.dumps(found))


def tell(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found), flush=True)
        return
    print(f"{found['loop']}: {found['workload']}, {found['ranks']} ranks, {found['rounds']} rounds")
    for name, words in (("to_plain", "to plain"), ("to_tuned", "to tuned")):
        one = found[name]
        low, high = one["interval"]
        print(f"  {words}: {one['ratio']:.3f} ({low:.3f} to {high:.3f})")
    print(f"  (tuned to plain: {found['tuned_to_plain']['ratio']:.3f})", flush=True)
    print(f"  median step, us: {found['median_step_us']}", flush=True)


if __name__ == "__main__":
    main()
