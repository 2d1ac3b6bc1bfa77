"""What gpu.py measures beside steps: host syncs, and what checkpoints cost. Prints JSON.

    python benchmarks/gpu_parts.py syncs [--tiny --device cpu]
    python benchmarks/gpu_parts.py checkpoint [--tiny --device cpu]

syncs: how often CUDA's sync debug mode flags the host in 104 steps with all usual callbacks. It
does not flag waiting for an event.

checkpoint: of GPT-2 124M with AdamW. A stall is how much longer the step takes that follows a save,
from synchronize to synchronize, in copies of the same state to pinned memory that is there already;
beside it a step's time while a checkpoint is written over that of the others, and a save in the
foreground over torch.save with fsync, turn by turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gpu_models import GPT, Classifier, Shape, mlp, pictures, rows_of_tokens
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    ClipGradients,
    EarlyStopping,
    GradientStats,
    LossSpikeGuard,
    LRSchedule,
    MixedPrecision,
    NonFiniteGuard,
    ParamSchedule,
    StochasticWeightAveraging,
    Throughput,
    TimeLimit,
)
from dtrain.loop import Loop

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from stand_in import NoReads, pretend

_FLAG = "called a synchronizing CUDA operation"


# ---------------------------------------------------------------------------- syncs


def syncs(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Returns how many there were, of which kinds; and that a planted one is seen."""
    found, planted = _flagged(device, plant=False), _flagged(device, plant=True)
    assert planted["flagged"], "a planted sync was not seen: the count says nothing"
    return {
        "steps": found["steps"],
        "count": len(found["flagged"]),
        "which": sorted({*found["flagged"]})[:5],
        "planted": len(planted["flagged"]),
        "verdicts": [_verdict("with all usual callbacks", len(found["flagged"]), 0)],
    }


def _flagged(device: torch.device, *, plant: bool) -> dict[str, Any]:
    flagged: list[str] = []
    steps, per_epoch, take_step = [0], 26, Loop._step

    def step(loop: Loop, feed: Any) -> bool:
        if loop.context.progress.step < per_epoch:  # there all is compiled, and memory is got
            return take_step(loop, feed)
        steps[0] += 1
        if device.type == "cpu":
            with NoReads(flagged):
                return take_step(loop, feed)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                return take_step(loop, feed)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            flagged.extend(str(one.message) for one in caught if _FLAG in str(one.message))

    def loss_fn(net: Any, batch: Any) -> Tensor:
        loss: Tensor = net(*batch)
        if plant:
            loss.item()
        return loss

    Loop._step = step  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = Classifier(mlp(32))
            trainer = dtrain.Trainer(
                model,
                torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
                loss_fn,
                callbacks=[
                    MixedPrecision("bf16"),
                    EMA(0.99),
                    StochasticWeightAveraging(1, every_steps=2),
                    NonFiniteGuard(),
                    LossSpikeGuard(window=8),
                    GradientStats(every=20),
                    Throughput(),
                    ClipGradients(1.0),
                    LRSchedule(lambda optimizer, steps: CosineAnnealingLR(optimizer, steps)),
                    ParamSchedule("weight_decay", lambda progress: 0.1 / (1 + progress.epoch)),
                    EarlyStopping("eval/loss", patience=1000),
                    Checkpoint(every_steps=30, keep=2),
                    TimeLimit("1h"),
                ],
                sinks=[],
                run_dir=folder,
            )
            data = TensorDataset(*pictures(per_epoch * 32 - 5, 784))
            trainer.fit(data, batch_size=32, epochs=5, eval_set=data, eval_every=40, log_every=20)
    finally:
        Loop._step = take_step  # type: ignore[method-assign]
    return {"steps": steps[0], "flagged": flagged}


# ---------------------------------------------------------------------------- checkpoints


class Watch(dtrain.Callback):
    """Times steps from synchronize to synchronize, and says what stands beside each."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = 0.0
        self._was_writing = self._saves = False
        self.steps: list[tuple[float, str]] = []  # seconds, and what stood beside

    def on_save(self, ctx: dtrain.Context) -> None:
        self._saves = True

    def on_step_end(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        _synchronize(self._device)
        now = time.perf_counter()
        writes = any(t.name == "dtrain: checkpoint" for t in threading.enumerate())
        beside = "written beside" if writes else "in part"
        kind = "saved" if self._saves else beside if self._was_writing else ""
        if self._began:
            self.steps.append((now - self._began, kind))
        self._saves, self._was_writing = False, writes
        self._began = time.perf_counter()

    def of(self, kind: str) -> list[float]:
        return [seconds for seconds, one in self.steps if one == kind]


class SavesByHand(dtrain.Callback):
    """Calls torch.save and fsync in the middle between two checkpoints."""

    def __init__(self, every: int, folder: str) -> None:
        self._every, self._file = every, Path(folder) / "torch.pt"
        self.seconds: list[float] = []

    def on_step_start(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        if step.number % self._every != self._every // 2:
            return
        _synchronize(ctx.device)
        began = time.perf_counter()
        with self._file.open("wb") as file:
            torch.save(_state(ctx), file)
            os.fsync(file.fileno())
        self.seconds.append(time.perf_counter() - began)


def checkpoint(device: torch.device, *, tiny: bool) -> dict[str, Any]:
    """Returns the figures of background saves, and of saves in the foreground."""
    shape, batch = (Shape(2, 32, 2, 96, 16), 2) if tiny else (Shape(), 8)
    every, saves = (12, 3) if tiny else (100, 3)
    torch.manual_seed(0)
    model = GPT(shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = TensorDataset(*rows_of_tokens(shape, (every * saves + every // 2) * batch))
    watch = Watch(device)
    with tempfile.TemporaryDirectory() as folder:

        def train(steps: int, *more: dtrain.Callback) -> dtrain.Context:
            """Trains so many steps; ``more`` are callbacks."""
            trainer = dtrain.Trainer(
                model,
                optimizer,
                lambda net, batch: net(batch[0]),
                callbacks=[MixedPrecision("bf16"), *more],
                sinks=[],
                run_dir=Path(folder) / f"run-{len(more)}",
            )
            data = dtrain.Data(rows, batch, shuffle=False)
            trainer.fit(data, max_steps=steps, log_every=10**6)
            return trainer.context

        ctx = train(every * saves + every // 2, Checkpoint(every_steps=every, keep=1), watch)
        copy_s = _copy_seconds(_state(ctx), device)
        few = 8
        by_hand, front = SavesByHand(few, folder), Watch(device)
        train(few * 4 + 1, Checkpoint(every_steps=few, background=False, keep=1), by_hand, front)
    step_s = statistics.median(watch.of(""))
    stalls = [seconds - step_s for seconds in watch.of("saved")]
    beside = watch.of("written beside")
    front_s = [seconds - statistics.median(front.of("")) for seconds in front.of("saved")]
    foreground = statistics.median(a / b for a, b in zip(front_s, by_hand.seconds, strict=False))
    found: dict[str, Any] = {
        "gib": sum(t.nbytes for t in _state(ctx).values()) / 2**30,
        "copy_s": copy_s,
        "step_s": step_s,
        "stalls_s": stalls,
        "steps_beside": len(beside),
        "foreground_s": front_s,
        "torch_save_s": by_hand.seconds,
        "verdicts": [
            _verdict("first background save, in copies", stalls[0] / copy_s, 1.5),
            _verdict("later ones", statistics.median(stalls[1:]) / copy_s, 1.5),
            _verdict("foreground / torch.save and fsync", foreground, 1.3),
        ],
    }
    if beside:
        ratio = statistics.median(beside) / step_s
        found["verdicts"].append(_verdict("a step while it is written", ratio, 1.05))
    else:
        found["note"] = "no step began and ended while a checkpoint was written"
    return found


def _state(ctx: dtrain.Context) -> dict[str, Tensor]:
    """Returns all tensors of model and optimizer, by name."""
    tensors = {f"model.{name}": t for name, t in ctx.model.state_dict().items()}
    for number, state in ctx.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": t for name, t in state.items()}
    return tensors


def _copy_seconds(state: dict[str, Tensor], device: torch.device) -> float:
    """Returns how long a copy to memory of the host takes that is there, and pinned."""
    places = [
        torch.empty_like(t, device="cpu", pin_memory=device.type == "cuda") for t in state.values()
    ]
    took = []
    for _ in range(6):
        _synchronize(device)
        began = time.perf_counter()
        for place, tensor in zip(places, state.values(), strict=True):
            place.copy_(tensor, non_blocking=True)
        _synchronize(device)
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _verdict(what: str, value: float, limit: float) -> dict[str, Any]:
    return {"what": what, "value": value, "limit": limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=["syncs", "checkpoint"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        pretend(SimpleNamespace(setattr=setattr))
    world = dtrain.init(seed=0)
    assert world.device.type == device.type, f"dtrain trains on {world.device}"
    part = {"syncs": syncs, "checkpoint": checkpoint}[arguments.part]
    print(json.dumps(part(device, tiny=arguments.tiny)))


if __name__ == "__main__":
    main()
