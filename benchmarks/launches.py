"""Counts what a training step asks of a GPU, where there is none: the CPU stands in for it.

    python benchmarks/launches.py                               # one rank
    RANKS=2 launch/torchrun.sh benchmarks/launches.py --json launches.json

A step's operators that would be launches or copies are counted, for a tuned loop by hand and
for dtrain on the ways that it takes on CUDA; views and other looks at a tensor are none. What is
captured counts as one launch when it is replayed, and so does an operator on a list of tensors.
Beside that: allocations of pinned memory, new events, and records of events. Fetching a batch is
counted apart: there, operators of the host gather rows.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

import dtrain
from dtrain import accelerator
from dtrain.callbacks import (
    EMA,
    ClipGradients,
    GradientAccumulation,
    GradientStats,
    LossSpikeGuard,
    LRSchedule,
    MixedPrecision,
    NonFiniteGuard,
    ParamSchedule,
    StochasticWeightAveraging,
    Throughput,
)
from dtrain.data import MicroBatches
from dtrain.loop import Loop

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from stand_in import StandIn

BATCH, WARM, STEPS = 32, 6, 4
#: Looks at a tensor; nothing is computed.
_NO_LAUNCH = (
    "view", "_unsafe_view", "as_strided", "detach", "alias", "slice", "select", "split", "unbind",
    "expand", "t", "transpose", "permute", "squeeze", "unsqueeze", "reshape", "_reshape_alias",
    "split_with_sizes", "empty", "empty_like", "empty_strided", "new_empty", "is_pinned", "narrow",
    "_local_scalar_dense", "lift_fresh", "set_", "resize_", "record_stream", "view_as_real",
)  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts operators by name, unless it is paused."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.paused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if not self.paused and space == "aten" and name not in _NO_LAUNCH:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def pause(self) -> Iterator[None]:
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1


class Counting(StandIn):
    """An accelerator that stands in, whose replays count as one launch each."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self._launches = launches

    def captured(self, compute: Callable[..., None]) -> Callable[..., None]:
        def replay(*args: Any) -> None:
            if not self._launches.paused:
                self._launches.seen["(a captured graph)"] += 1
            with self._launches.pause():
                compute(*args)

        return replay


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)
    )


def dataset(rows: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(10, (rows,), generator=draw)
    return TensorDataset(torch.randn(rows, 64, generator=draw), labels)


def loss_fn(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)


def by_hand(
    *, clips: bool = False, micros: int = 1, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Counts a tuned loop's."""
    net: nn.Module = model()
    if dist.is_initialized() and dist.get_world_size() > 1:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)
    opt, losses = optimizer(net), torch.zeros(())
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    x, y = dataset(BATCH).tensors
    counted = Launches()
    for step in range(WARM + STEPS):
        if step == WARM:
            counted.seen.clear()
        with counted:
            opt.zero_grad(set_to_none=True)
            for _ in range(micros):
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss = F.cross_entropy(net(x), y)
                scaler.scale(loss / micros if micros > 1 else loss).backward()
                losses += loss.detach()
            if clips:
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()
    return figures(counted.seen, Counter())


def figures(seen: Counter[str], made: Counter[str]) -> dict[str, Any]:
    """Returns what is counted of a step."""
    by_name = {name: count / STEPS for name, count in sorted(seen.items())}
    return {
        "launches": sum(by_name.values()),
        "pinned": made["pinned"] / STEPS,
        "events": made["events"] / STEPS,
        "records": made["records"] / STEPS,
        "by_name": by_name,
    }


def by_dtrain(callbacks: list[dtrain.Callback], strategy: str = "auto") -> dict[str, Any]:
    """Counts dtrain's."""
    counted, steps = Launches(), [0]
    stand_in, take_step = Counting(counted), Loop._step
    start: Counter[str] = Counter()
    stop: Counter[str] = Counter()
    seen: Counter[str] = Counter()

    def step(loop: Loop, feed: MicroBatches) -> bool:
        if steps[0] == WARM:
            counted.seen.clear()
            start.update(stand_in.counts)
        if steps[0] == WARM + STEPS:
            stop.update(stand_in.counts)
            seen.update(counted.seen)
        steps[0] += 1
        kind = type(feed)
        fetch = kind.next

        def fetch_uncounted(feed: Any) -> Any:
            with counted.pause():
                return fetch(feed)

        with patch.object(kind, "next", fetch_uncounted), counted:
            return take_step(loop, feed)

    with patch.object(accelerator, "of", stand_in.of), patch.object(Loop, "_step", step):
        world = dtrain.init(seed=0)
        trainer = dtrain.Trainer(
            model(), optimizer, loss_fn, callbacks=callbacks, sinks=[], strategy=strategy
        )
        rows = BATCH * world.size * (WARM + STEPS + 2)
        trainer.fit(dataset(rows), batch_size=BATCH * world.size, epochs=1, log_every=10**6)
    assert steps[0] == WARM + STEPS + 2
    return figures(seen, stop - start)


def five() -> list[dtrain.Callback]:
    schedule = LRSchedule(lambda opt, steps: LambdaLR(opt, lambda step: 1.0 / (1 + step)))
    return [EMA(0.99), NonFiniteGuard(), GradientStats(), Throughput(), schedule]


CASES: dict[str, Callable[[], list[dtrain.Callback]]] = {
    "bare": list,
    "ClipGradients": lambda: [ClipGradients(1.0)],
    "GradientAccumulation": lambda: [GradientAccumulation(3)],
    "MixedPrecision bf16": lambda: [MixedPrecision("bf16")],
    "MixedPrecision fp16": lambda: [MixedPrecision("fp16")],
    "EMA": lambda: [EMA(0.99)],
    "StochasticWeightAveraging": lambda: [StochasticWeightAveraging(0, every_steps=1)],
    "NonFiniteGuard": lambda: [NonFiniteGuard()],
    "LossSpikeGuard": lambda: [LossSpikeGuard(window=3)],
    "GradientStats": lambda: [GradientStats()],
    "Throughput": lambda: [Throughput()],
    "LRSchedule": lambda: five()[-1:],
    "ParamSchedule": lambda: [ParamSchedule("weight_decay", lambda progress: 0.1)],
    "five of these": five,
}
#: Of a case, the loop written by hand that does the same, where that is no other than the bare one.
SAME: dict[str, dict[str, Any]] = {
    "ClipGradients": {"clips": True},
    "GradientAccumulation": {"micros": 3},
    "MixedPrecision bf16": {"dtype": torch.bfloat16},
    "MixedPrecision fp16": {"dtype": torch.float16},
}


def count() -> dict[str, Any]:
    """Counts all cases in the world that this process is in. Ranks: all, communicates."""
    dtrain.init(seed=0)
    strategies = ["flat", "ddp"] if dtrain.init().size > 1 else ["flat"]
    found: dict[str, Any] = {}
    for name, make in CASES.items():
        ours = {strategy: by_dtrain(make(), strategy) for strategy in strategies}
        found[name] = {"by hand": by_hand(**SAME.get(name, {})), **ours}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="writes all figures there")
    parser.add_argument("--names", action="store_true", help="says which operators these are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = count()
    if not dtrain.init().is_main:
        return
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'a step: launches, and more than by hand':42s} records  events  pinned")
    for name, row in found.items():
        base = row["by hand"]["launches"]
        for strategy, one in row.items():
            more = "" if strategy == "by hand" else f"{one['launches'] - base:+7.1f}"
            label = f"{name}, {strategy}"
            print(
                f"{label:30s} {one['launches']:6.1f} {more:7s} "
                f"{one['records']:5.1f} {one['events']:7.1f} {one['pinned']:7.1f}"
            )
            if options.names:
                print("    " + ", ".join(f"{n} {c:g}" for n, c in one["by_name"].items()))


if __name__ == "__main__":
    main()
