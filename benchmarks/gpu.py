"""What a training step costs on one GPU: dtrain, tuned loops by hand, and its peers.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --tiny --device cpu          # the same code, in a minute: a dry run

Three models: an MLP (784-512-512-10, batch 128, float32), a ResNet-18 for 32 x 32 pictures (batch
128, float32), GPT-2 124M (bfloat16 autocast, torch.compile). Every loop does the same work
(gpu_loops.py) on the same random rows, and reads its mean loss once a block; these losses are
printed, because loops that do the same work have about the same.

- tuned: the loop written by hand; again: the same once more.
- dtrain; and with EMA, NonFiniteGuard, GradientStats and Throughput ("five": LRSchedule and
  ClipGradients are in all of them).
- lightning, accelerate, transformers: left out, and named, where they are not installed.
- captured, dtrain graph: forward and backward as one captured CUDA graph, by hand and by
  Trainer(graph=True). reduce, dtrain reduce: tuned and dtrain, with
  torch.compile(mode="reduce-overhead").

All live in one process. Each has a thread; exactly one of them goes on at a time, for a block of
steps from synchronize to synchronize, and then hands over, in an order drawn anew for each round. A
ratio is the median, over rounds, of a loop's time for a block over that of its yardstick in the
same round, and the interval that this median lies in with 95 % confidence; how far "again" is from
1 is what the figures can be trusted to. A model's rounds end when its share of --seconds is over.

Memory is a loop's own: what the allocator holds at most during its blocks, less what the others
hold. Syncs, a start's parts and checkpoints: gpu_parts.py.

Model FLOPs utilisation is tokens per second times FLOPs per token over the device's peak, with
6 N + 12 L H Q T FLOPs per token (Chowdhery et al., "PaLM", 2022, appendix B): N parameters without
the position embedding, L layers, H heads of dimension Q, T tokens in a sequence. Peaks are those
for dense bfloat16 by the maker; `--peak-tflops` for a device that is not in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_loops import LOOPS, PEERS, REDUCES, Turn, Work, takes_graph
from gpu_models import GPT, Classifier, Shape, mlp, pictures, resnet18, rows_of_tokens
from lane import compare
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
#: TFLOP/s, dense bfloat16. What a device's name must hold; the first that fits counts.
PEAK_TFLOPS = [
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200 NVL", 836.0),
    ("H200", 989.0),
    ("A100", 312.0),
]
#: The most that a loop's time may be of its yardstick's, by model: loop, yardstick, limit.
LIMITS = {
    "mlp": [
        ("dtrain", "tuned", 1.15),
        ("dtrain graph", "captured", 1.15),
        ("dtrain reduce", "reduce", 1.15),
    ],
    "resnet": [("dtrain", "tuned", 1.03), ("dtrain, five", "tuned", 1.10)],
    "gpt": [("dtrain", "tuned", 0.995)],
}
MEMORY_LIMIT = 1.02
#: What else is measured, and by which share of all seconds it must be done.
PARTS = {"syncs": 0.12, "start": 0.26, "checkpoint": 0.42}
NEEDS = {"checkpoint": 60}  # seconds: it saves GPT-2 and its optimizer ten times
YARDSTICKS = {"dtrain graph": "captured", "dtrain reduce": "reduce"}  # tuned, for all others
GRAPHS = ("captured", "dtrain graph", *REDUCES)


# ---------------------------------------------------------------------------- taking turns


class Turns:
    """Lets exactly one of several threads go on at a time; see the module's docstring."""

    def __init__(self, block: int, device: torch.device) -> None:
        self._block = block
        self._device = device
        self._changed = threading.Condition()
        self._whose = ""  # "" where it is the main thread's turn
        self.failed: dict[str, str] = {}
        self._seconds = 0.0
        self._began = 0.0
        self._steps: dict[str, int] = {}
        self._own: dict[str, int] = {}  # bytes that a loop holds between its turns

    def start(self, name: str, run: Callable[[Turn], None]) -> Turn:
        """Begins a loop in a thread; ``run`` is given what it must call after each step."""
        turn = Turn(lambda: self._step_done(name))

        def body() -> None:
            try:
                self._await(name)
                run(turn)
            except BaseException:  # noqa: BLE001 -- told in the main thread
                self.failed[name] = traceback.format_exc()
            finally:
                self._hand_to("")

        threading.Thread(target=body, name=name, daemon=True).start()
        return turn

    def take(self, name: str) -> tuple[float, int]:
        """Lets a loop take a block of steps; returns its seconds, and the most bytes it held.

        NaN where it failed or had no more steps to take.
        """
        self._seconds, on_cuda = float("nan"), self._device.type == "cuda"
        before = torch.cuda.memory_allocated(self._device) if on_cuda else 0
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._hand_to(name)
        self._await("")
        if not on_cuda:
            return self._seconds, 0
        others = before - self._own.get(name, 0)
        self._own[name] = torch.cuda.memory_allocated(self._device) - others
        return self._seconds, torch.cuda.max_memory_allocated(self._device) - others

    def _step_done(self, name: str) -> None:
        done = self._steps[name] = self._steps.get(name, 0) + 1
        if done % self._block == 0:
            self._synchronize()
            self._seconds = time.perf_counter() - self._began
            self._hand_to("")
            self._await(name)

    def _await(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._whose == name)
        self._synchronize()
        self._began = time.perf_counter()

    def _hand_to(self, name: str) -> None:
        with self._changed:
            self._whose = name
            self._changed.notify_all()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


# ---------------------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and which loops train it for how long."""

    make: Callable[[], nn.Module]
    rows: Callable[[int], tuple[Tensor, ...]]
    loops: tuple[str, ...]
    batch: int
    block: int  # steps of a loop at a time
    rounds: int
    warm_up: int  # rounds that do not count
    share: float  # of all seconds
    is_bf16: bool = False
    is_compiled: bool = False


_ALL = ("tuned", "again", "dtrain", "dtrain, five", *PEERS)


def cases(shape: Shape, *, tiny: bool) -> dict[str, Case]:
    gpt = Case(
        lambda: GPT(shape), partial(rows_of_tokens, shape),
        tuple(name for name in _ALL if "five" not in name), 16, 10, 20, 2, 0.62, True, True,
    )  # fmt: skip
    small = Case(
        lambda: Classifier(mlp()), partial(pictures_of, 784), (*_ALL, *GRAPHS), 128, 50, 20, 3, 0.18
    )
    images = Case(
        lambda: Classifier(resnet18()), partial(pictures_of, 3, 32, 32), _ALL, 128, 20, 20, 2, 0.2
    )
    if tiny:
        few = {"batch": 2, "block": 3, "rounds": 3, "warm_up": 1}
        small = replace(small, make=lambda: Classifier(mlp(8)), **few)
        images = replace(
            images,
            make=lambda: Classifier(resnet18(2)),
            rows=partial(pictures_of, 3, 8, 8),
            **few,
        )
        gpt = replace(gpt, **few)
    return {"mlp": small, "resnet": images, "gpt": gpt}


def pictures_of(*size_and_samples: int) -> tuple[Tensor, ...]:
    *size, samples = size_and_samples
    return pictures(samples, *size)


def measure(case: Case, device: torch.device, backend: str, until: float) -> dict[str, Any]:
    """Has all loops of a case take turns; returns their figures, and which failed or are absent."""
    left_out = {
        name: "not installed"
        for name in case.loops
        if LOOPS[name][0] and not any(find_spec(package) for package in LOOPS[name][0])
    }
    if not takes_graph():
        left_out |= {n: "no Trainer(graph=True) here" for n in case.loops if n == "dtrain graph"}
    names = [name for name in case.loops if name not in left_out]
    steps = case.block * (case.rounds + case.warm_up) + 1  # none comes to its end in between
    torch.manual_seed(1)
    rows = case.rows(steps * case.batch)
    if device.type == "cuda":
        rows = tuple(column.pin_memory() for column in rows)
    compiled = None if backend == "none" else {"backend": backend}
    work = Work(
        case.make, rows, case.batch, steps, case.block, device, case.is_bf16,
        compiled if case.is_compiled else None,
    )  # fmt: skip
    # What stands in for it on the CPU captures nothing.
    reduces = {"mode": "reduce-overhead"} if backend == "inductor" else compiled
    work_of = {name: replace(work, compiled=reduces) if name in REDUCES else work for name in names}
    if find_spec("accelerate"):  # it, and what uses it, keeps one precision in a process
        import_module("accelerate.state").AcceleratorState._reset_state(True)
    turns, order = Turns(case.block, device), random.Random(0)
    losses = {n: turns.start(n, partial(LOOPS[n][1], work_of[n])).losses for n in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, int] = dict.fromkeys(names, 0)
    done = 0
    for number in range(-case.warm_up, case.rounds):
        for name in order.sample(names, len(names)):
            if name in turns.failed:
                continue
            began = time.perf_counter()
            took, held = turns.take(name)
            if name in turns.failed:
                print(f"{name} failed:\n{turns.failed[name]}", file=sys.stderr, flush=True)
            elif number < 0:
                print(f"  {name}: warmed up in {time.perf_counter() - began:.1f} s", flush=True)
            else:
                seconds[name].append(took)
                memory[name] = max(memory[name], held)
        done = number + 1
        if done >= 2 and time.monotonic() > until:
            break
    seconds = {name: one for name, one in seconds.items() if name not in turns.failed}
    found = {
        "batch": case.batch,
        "block": case.block,
        "rounds": done,
        "rounds_meant": case.rounds,
        "left_out": left_out,
        "failed": dict(turns.failed),
        "loops": {},
    }
    last = min((len(losses[name]) for name in seconds), default=0) - 1  # that all have told of
    for name, times in seconds.items():
        of = YARDSTICKS.get(name, "tuned")
        found["loops"][name] = {
            "step_s": statistics.median(times) / case.block,
            **({"of": of, **compare(times, seconds[of])} if of in seconds else {}),
            "memory_mib": memory[name] / 2**20,
            "loss": losses[name][last] if last >= 0 else None,
            "block_seconds": times,
        }
    return found


def judge(model: str, loops: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what a model's figures were to be, and are."""
    pairs = [*LIMITS[model], *(("dtrain", peer, 1.0) for peer in PEERS)]
    verdicts = []
    for name, of, limit in pairs:
        if name in loops and of in loops:
            found = compare(loops[name]["block_seconds"], loops[of]["block_seconds"])
            one = verdict(f"{model}: {name} / {of}", found["ratio"], limit)
            verdicts.append({**one, "interval": found["interval"]})
    mine, yardstick = (loops.get(name, {}).get("memory_mib") for name in ("dtrain", "tuned"))
    if mine and yardstick:
        what = f"{model}: peak memory, dtrain / tuned"
        verdicts.append(verdict(what, mine / yardstick, MEMORY_LIMIT))
    return verdicts


def verdict(what: str, value: float, limit: float) -> dict[str, Any]:
    return {"what": what, "value": value, "limit": limit, "within": bool(value <= limit)}


# ---------------------------------------------------------------------------- what is told


def peak_tflops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS if part in name), None)


def first_line(*command: str) -> str:
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return told.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def describe(device: torch.device) -> dict[str, Any]:
    """What the figures were made with."""
    packages = {}
    for package in (
        "accelerate", "lightning", "pytorch-lightning", "transformers", "triton", "numpy",
    ):  # fmt: skip
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    told: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": packages,
        # A copy without its history may say it otherwise.
        "commit": os.environ.get("COMMIT")
        or first_line("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "cores": os.cpu_count(),
        "device": "cpu",
    }
    if device.type == "cuda":
        told["driver"] = first_line(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
        told["device"] = torch.cuda.get_device_name(device)
        told["device_memory_gib"] = round(
            torch.cuda.get_device_properties(device).total_memory / 2**30, 1
        )
    return told


def show(model: str, found: dict[str, Any]) -> None:
    fewer = "" if found["rounds"] == found["rounds_meant"] else f" of {found['rounds_meant']}"
    print(f"\n{model}: {found['rounds']}{fewer} rounds of {found['block']} steps")
    if fewer:
        print("  its time was over: the other rounds were left out")
    print(f"  {'':13} ms/step    MiB     loss   time/yardstick (95 %)")
    for name, one in found["loops"].items():
        ratio = ""
        if "ratio" in one:
            low, high = one["interval"]
            ratio = f"{one['ratio']:.4f} of {one['of']} ({low:.4f} to {high:.4f})"
        loss = "      -" if one["loss"] is None else f"{one['loss']:7.4f}"
        print(
            f"  {name:13} {1e3 * one['step_s']:7.3f} {one['memory_mib']:6.0f}  {loss}   {ratio}"
            + (f"  {one['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in one else "")
            + (f", MFU {one['mfu']:.1%}" if one.get("mfu") else "")
        )
    for name, why in found["left_out"].items():
        print(f"  {name:13} left out: {why}")
    for name in found["failed"]:
        print(f"  {name:13} FAILED")


def part(name: str, arguments: argparse.Namespace, until: float) -> dict[str, Any]:
    """Runs a part of gpu_parts.py in a process of its own, which has met no GPU yet."""
    file = "gpu_start.py" if name == "start" else "gpu_parts.py"
    here = [sys.executable, str(Path(__file__).parent / file), name]
    here += ["--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
    left = until - time.monotonic()
    needs = 15 if arguments.tiny else NEEDS.get(name, 15)
    if left < needs:
        return {"left_out": f"{max(left, 0):.0f} s were left, of the {needs} that it may take"}
    here += ["--seconds", f"{left - 10:.0f}"] if name == "start" else []
    try:
        told = subprocess.run(here, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {left:.0f} s"}
    if told.returncode:
        return {"failed": (told.stdout + told.stderr)[-4000:]}
    return json.loads(told.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of some thousand parameters")
    parser.add_argument("--models", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--loops", nargs="+", choices=list(LOOPS), help="tuned and these")
    parser.add_argument("--rounds", type=int, help="20; with --tiny 3")
    parser.add_argument("--seconds", type=float, default=360.0, help="for all of it")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--backend", help="of torch.compile: inductor (with --tiny eager), none")
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense bfloat16")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    began = time.monotonic()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # transformers.Trainer would take them all
    tiny = arguments.tiny
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is available; --tiny --device cpu is a dry run")
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    backend = arguments.backend or ("eager" if tiny else "inductor")
    shape = Shape(2, 32, 2, 96, 16) if tiny else Shape()
    peak = arguments.peak_tflops or peak_tflops(device)
    found: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "machine": describe(device),
        "models": {},
        "parts": {},
        "verdicts": [],
    }
    machine, verdicts = found["machine"], found["verdicts"]
    print(f"{machine['device']}, torch {machine['torch']}, CUDA {machine['cuda']}, {backend}")

    def keep() -> None:
        if arguments.json:  # after each part: what is killed later has told of these
            found["seconds"] = time.monotonic() - began
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")

    for name in arguments.parts:
        # Before the models: in this process they would leave memory that is pinned already.
        one = part(name, arguments, began + PARTS[name] * arguments.seconds)
        found["parts"][name] = one
        verdicts += [
            verdict(f"{name}: {v['what']}", v["value"], v["limit"]) for v in one.pop("verdicts", [])
        ]
        told = f"FAILED\n{one['failed']}" if "failed" in one else json.dumps(one, indent=2)
        print(f"\n{name}: {told}", flush=True)
        keep()
    # Its backward runs in a thread that all loops share: what that gets for itself is nobody's.
    torch.ones(64, 64, device=device, requires_grad=True).mm(
        torch.ones(64, 64, device=device)
    ).sum().backward()
    for name in arguments.models:
        case = cases(shape, tiny=tiny)[name]
        if arguments.rounds:
            case = replace(case, rounds=arguments.rounds)
        if arguments.loops:
            wanted = {*arguments.loops, "tuned"}
            case = replace(case, loops=tuple(n for n in case.loops if n in wanted))
        print(f"\n{name}:", flush=True)
        left = began + arguments.seconds - time.monotonic()
        shares = sum(
            cases(shape, tiny=tiny)[n].share
            for n in arguments.models[arguments.models.index(name) :]
        )
        until = time.monotonic() + left * case.share / shares
        one = found["models"][name] = measure(case, device, backend, until)
        if name == "gpt":
            add_tokens(one, shape, peak)
        show(name, one)
        verdicts += judge(name, one["loops"])
        keep()
    print()
    for v in verdicts:
        word = "within" if v["within"] else "over"
        spread = " ({:.4f} to {:.4f})".format(*v["interval"]) if "interval" in v else ""
        print(f"{word:7} {v['what']}: {v['value']:.4f}{spread}, limit {v['limit']:g}")
    over = sum(not v["within"] for v in verdicts)
    print(f"{len(verdicts) - over} within, {over} over, after {time.monotonic() - began:.0f} s")
    broken = any("failed" in one for one in found["parts"].values())
    broken = broken or any(one["failed"] for one in found["models"].values())
    keep()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if broken else 0)  # all loops stand in the middle of a training


def add_tokens(found: dict[str, Any], shape: Shape, peak: float | None) -> None:
    with torch.device("meta"):
        model = GPT(shape)
    per_token = shape.flops_per_token(model)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["flops_per_token"], found["peak_tflops"] = per_token, peak
    for one in found["loops"].values():
        rate = found["batch"] * shape.length / one["step_s"]
        one["tokens_per_s"] = rate
        one["mfu"] = rate * per_token / (peak * 1e12) if peak else None


if __name__ == "__main__":
    main()
