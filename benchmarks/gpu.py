"""Tokens per second of GPT-2 124M on one GPU: dtrain, a tuned hand-written loop, and its peers.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --tiny --device cpu          # the same code, in seconds: a dry run

Every loop trains the same model (bfloat16 autocast, torch.compile, fused AdamW, clipped gradients,
a schedule) on the same random tokens, which lie in pinned memory, and reads its mean loss once a
block; these losses are printed, because loops that do the same work have about the same.

All live in one process. Each has a thread; exactly one of them goes on at a time, for a block of
steps from synchronize to synchronize, and then hands over, in an order drawn anew for each round. A
ratio is the median, over rounds, of a loop's time for a block over that of the tuned loop in the
same round, and the interval that this median lies in with 95 % confidence; "again" is the tuned
loop once more: how far it is from 1 is what the figures can be trusted to. Loops whose package is
not there are named as not installed.

Model FLOPs utilisation is tokens per second times FLOPs per token over the device's peak, with
6 N + 12 L H Q T FLOPs per token (Chowdhery et al., "PaLM", 2022, appendix B): N parameters without
the position embedding, L layers, H heads of dimension Q, T tokens in a sequence. Peaks are those
for dense bfloat16 by the maker; `--peak-tflops` for a device that is not in the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shlex
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lane import compare
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import dtrain
from dtrain.callbacks import ClipGradients, LRSchedule, MixedPrecision

#: TFLOP/s, dense bfloat16. What a device's name must hold; the first that fits counts.
PEAK_TFLOPS = [
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200 NVL", 836.0),
    ("H200", 989.0),
    ("A100", 312.0),
]
CLIP = 1.0


@dataclass(frozen=True, slots=True)
class Shape:
    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50304
    length: int = 1024

    def flops_per_token(self, model: nn.Module) -> float:
        """Forward and backward; see the module's docstring."""
        count = sum(p.numel() for p in model.parameters()) - self.length * self.width
        return 6 * count + 12 * self.layers * self.width * self.length


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, width = shape.heads, shape.width
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.before_attention(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, width / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.before_mlp(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2: learned positions, the head tied to the embedding, no dropout. Returns the loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, rows: Tensor) -> Tensor:
        x, y = rows[:, :-1], rows[:, 1:]
        hidden = self.tokens(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


# ---------------------------------------------------------------------------- taking turns


@dataclass(slots=True)
class Turn:
    """A loop's end of it.

    Attributes:
        step_done: to be called after each step.
        losses: the mean loss of each block.
    """

    step_done: Callable[[], None]
    losses: list[float] = field(default_factory=list)

    def tell(self, total: torch.Tensor, steps: int) -> None:
        """Reads a sum of losses over so many steps, and begins it anew."""
        self.losses.append(total.item() / steps)
        total.zero_()


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

    def seconds_of_a_block(self, name: str) -> float:
        """Lets a loop take a block of steps; NaN where it failed or had no more steps to take."""
        self._seconds = float("nan")
        self._hand_to(name)
        self._await("")
        return self._seconds

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


# ---------------------------------------------------------------------------- the loops


@dataclass(frozen=True, slots=True)
class Work:
    """What every loop is to do."""

    shape: Shape
    batch: int
    steps: int
    report_every: int
    device: torch.device
    backend: str
    rows: Tensor  # [samples, length + 1], pinned where there is a GPU

    def compiled(self) -> tuple[nn.Module, nn.Module]:
        """Returns the model, equal for all loops; and what is to be called instead of it."""
        torch.manual_seed(0)
        model = GPT(self.shape).to(self.device)
        if self.backend == "none":
            return model, model
        return model, torch.compile(model, backend=self.backend)  # type: ignore[return-value]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def rate(self, step: int) -> float:
        """Warms up, then falls to a tenth."""
        return min((step + 1) / 10, 1.0) * (1 - 0.9 * min(1.0, step / self.steps))

    def loader(self) -> DataLoader[Any]:
        """As a user of torch makes it."""
        return DataLoader(
            TensorDataset(self.rows), self.batch, pin_memory=self.device.type == "cuda"
        )


Run = Callable[[Work, Turn], None]


def tuned(work: Work, turn: Turn) -> None:
    """The hand-written loop, with what is known to make it fast."""
    model, call = work.compiled()
    optimizer = work.optimizer(model)
    schedule = LambdaLR(optimizer, work.rate)
    losses = torch.zeros((), device=work.device)

    def batches() -> Iterator[Tensor]:
        """Each is on its way while the step before it is computed."""
        ahead: Tensor | None = None
        for start in range(0, work.steps * work.batch, work.batch):
            # Rows that follow one another are a view of pinned memory.
            coming = work.rows[start : start + work.batch].to(work.device, non_blocking=True)
            if ahead is not None:
                yield ahead
            ahead = coming
        assert ahead is not None
        yield ahead

    for number, rows in enumerate(batches(), 1):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(work.device.type, torch.bfloat16):
            loss = call(rows)
        loss.backward()
        losses += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if number % work.report_every == 0:
            turn.tell(losses, work.report_every)
        turn.step_done()


class AfterStep(dtrain.Callback):
    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._loss: float | None = None

    def on_step_start(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        loss = ctx.metrics.get("train/loss")  # agreed on after a block's last on_step_end
        if loss is not None and loss != self._loss:
            self._turn.losses.append(loss)
        self._loss = loss

    def on_step_end(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        self._turn.step_done()


def ours(work: Work, turn: Turn) -> None:
    model, call = work.compiled()
    with dtrain.init(seed=0):
        trainer = dtrain.Trainer(
            call,
            work.optimizer(model),
            lambda net, batch: net(batch[0]),
            callbacks=[
                MixedPrecision("bf16"),
                ClipGradients(CLIP),
                LRSchedule(lambda optimizer, steps: LambdaLR(optimizer, work.rate)),
                AfterStep(turn),
            ],
            sinks=[],
        )
        trainer.fit(
            dtrain.Data(TensorDataset(work.rows), work.batch, shuffle=False),
            max_steps=work.steps,
            log_every=work.report_every,
        )


def accelerate(work: Work, turn: Turn) -> None:
    from accelerate import Accelerator

    # Compiled by us, as for the others; Accelerate wraps what it is given.
    model, call = work.compiled()
    accelerator = Accelerator(mixed_precision="bf16", cpu=work.device.type == "cpu")
    optimizer = work.optimizer(model)
    schedule = LambdaLR(optimizer, work.rate)
    call, optimizer, loader, schedule = accelerator.prepare(
        call, optimizer, work.loader(), schedule
    )
    losses = torch.zeros((), device=work.device)
    for number, (rows,) in enumerate(loader, 1):
        with accelerator.accumulate(call):
            loss = call(rows)
            accelerator.backward(loss)
            losses += loss.detach()
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(call.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if number % work.report_every == 0:
            turn.tell(losses, work.report_every)
        turn.step_done()


def lightning(work: Work, turn: Turn) -> None:
    from importlib import import_module

    name = "lightning.pytorch" if find_spec("lightning") else "pytorch_lightning"
    pl: Any = import_module(name)
    model, call = work.compiled()

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self._call = [call]  # in a list, so that it is no second submodule
            self._losses = torch.zeros((), device=work.device)

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            loss: Tensor = self._call[0](batch[0])
            self._losses += loss.detach()
            if (number + 1) % work.report_every == 0:
                turn.tell(self._losses, work.report_every)
            return loss

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            # Not Trainer(gradient_clip_val=...): with 16-bit precision it refuses a fused one.
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = work.optimizer(self.model)
            schedule = {"scheduler": LambdaLR(optimizer, work.rate), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    class Hand(pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, *ignored: Any) -> None:
            turn.step_done()

    trainer = pl.Trainer(
        accelerator="cpu" if work.device.type == "cpu" else "gpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=work.steps,
        callbacks=[Hand()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), work.loader())


#: By name: the packages of which one must be there, and the loop.
LOOPS: dict[str, tuple[tuple[str, ...], Run]] = {
    "tuned": ((), tuned),
    "again": ((), tuned),
    "dtrain": ((), ours),
    "lightning": (("lightning", "pytorch_lightning"), lightning),
    "accelerate": (("accelerate",), accelerate),
}
NEEDED = ("tuned", "again", "dtrain")


# ---------------------------------------------------------------------------- measuring


def measure(
    work: Work, names: list[str], rounds: int, warm_up: int, block: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, str]]:
    """Returns the seconds of each loop's blocks, their losses, and what was raised in which."""
    turns = Turns(block, work.device)
    losses = {name: turns.start(name, partial(LOOPS[name][1], work)).losses for name in names}
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        for name in order.sample(names, len(names)):
            if name in turns.failed:
                continue
            began = time.perf_counter()
            took = turns.seconds_of_a_block(name)
            if name in turns.failed:
                print(f"{name} failed:\n{turns.failed[name]}", file=sys.stderr, flush=True)
            elif number < 0:
                print(f"{name}: warmed up in {time.perf_counter() - began:.1f} s", flush=True)
            else:
                seconds[name].append(took)
    return {n: s for n, s in seconds.items() if n not in turns.failed}, losses, turns.failed


def peak_tflops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS if part in name), None)


def describe(device: torch.device) -> dict[str, Any]:
    """What the figures were made with."""
    packages = {}
    for package in ("accelerate", "lightning", "pytorch-lightning", "triton", "numpy"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    told: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": packages,
        "device": "cpu",
    }
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
            told["driver"] = lines.stdout.splitlines()[0].strip()
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            told["driver"] = f"unknown ({type(error).__name__})"
        told["device"] = torch.cuda.get_device_name(device)
        told["device_memory_gib"] = round(
            torch.cuda.get_device_properties(device).total_memory / 2**30, 1
        )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of some thousand parameters")
    parser.add_argument("--batch", type=int, help="sequences in a step (16; with --tiny 2)")
    parser.add_argument("--rounds", type=int, help="30; with --tiny 4")
    parser.add_argument("--block", type=int, default=10, help="steps of a loop at a time")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds that do not count")
    parser.add_argument("--loops", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    parser.add_argument("--backend", help="of torch.compile: inductor (with --tiny eager), none")
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense bfloat16")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    tiny = arguments.tiny
    shape = Shape(2, 32, 2, 96, 16) if tiny else Shape()
    batch = arguments.batch or (2 if tiny else 16)
    rounds = arguments.rounds or (4 if tiny else 30)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is available; --tiny --device cpu is a dry run")
    device = (
        torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    )
    torch.set_float32_matmul_precision("high")

    names = [name for name in LOOPS if name in {*arguments.loops, "tuned"}]
    absent = [n for n in names if LOOPS[n][0] and not any(find_spec(p) for p in LOOPS[n][0])]
    names = [name for name in names if name not in absent]
    steps = arguments.block * (rounds + arguments.warm_up) + 1  # none comes to its end in between
    torch.manual_seed(1)
    rows = torch.randint(shape.vocabulary, (steps * batch, shape.length + 1))
    work = Work(
        shape,
        batch,
        steps,
        arguments.block,
        device,
        arguments.backend or ("eager" if tiny else "inductor"),
        rows.pin_memory() if device.type == "cuda" else rows,
    )
    seconds, losses, failed = measure(work, names, rounds, arguments.warm_up, arguments.block)

    with torch.device("meta"):
        model = GPT(shape)
    per_token = shape.flops_per_token(model)
    peak = arguments.peak_tflops or peak_tflops(device)
    tokens = batch * shape.length * arguments.block
    last = min(len(losses[name]) for name in seconds) - 1  # the last block that all have told of
    found: dict[str, Any] = {}
    for name, times in seconds.items():
        rate = tokens / statistics.median(times)
        found[name] = {
            "tokens_per_s": rate,
            "mfu": rate * per_token / (peak * 1e12) if peak else None,
            **(compare(times, seconds["tuned"]) if "tuned" in seconds else {}),
            "loss": losses[name][last],
            "block_seconds": times,
        }
    machine = describe(device)
    parameters = sum(p.numel() for p in model.parameters())
    told = "unknown" if peak is None else f"{peak:.0f} TFLOP/s"
    print(f"\n{machine['device']} (peak {told}), torch {machine['torch']}, {work.backend}")
    print(f"{parameters:,} parameters, {batch} x {shape.length} tokens a step")
    print(f"{rounds} rounds of {arguments.block} steps")
    print(f"{'':11} tokens/s     MFU     loss   time/tuned (95 %)")
    for name, one in found.items():
        mfu = "    -" if one["mfu"] is None else f"{one['mfu']:.1%}"
        ratio = ""
        if "ratio" in one:
            low, high = one["interval"]
            ratio = f"{one['ratio']:.4f} ({low:.4f} to {high:.4f})"
        print(f"{name:11} {one['tokens_per_s']:>9,.0f}   {mfu:>5}   {one['loss']:.4f}   {ratio}")
    for name in absent:
        print(f"{name:11} not installed")
    for name in failed:
        print(f"{name:11} FAILED")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
            "machine": machine,
            "model": {
                "parameters": parameters,
                "flops_per_token": per_token,
                "peak_tflops": peak,
                "batch": batch,
                "length": shape.length,
                "block": arguments.block,
                "rounds": rounds,
                "compiled_with": work.backend,
            },
            "loops": found,
            "not_installed": absent,
            "failed": failed,
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    sys.stdout.flush()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
