"""What memory a rank of a sharded model takes at most, against the arithmetic of docs/sharded.md.

    RANKS=2 launch/torchrun.sh benchmarks/sharded_memory.py
    RANKS=2 launch/torchrun.sh benchmarks/sharded_memory.py --millions 1000 --layers 24

A transformer in float32 with AdamW, in batches of one sample of a few tokens, so that activations
are small. It is started from dtrain.meta_init, trained, saved, and restored. The peak of each phase
is the kernel's (VmHWM, which is reset before it), less what the process had once a small model had
gone through all of that: torch, gloo and all that is imported.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from sharded import Transformer, loss_fn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.accelerator import give_back_heap
from dtrain.callbacks import Checkpoint, ClipGradients
from dtrain.strategies import FSDP

VOCABULARY, CONTEXT, STEPS = 256, 4, 3
MIB = 2**20


def status(name: str) -> int:
    """Returns a number of bytes that the kernel tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Peaks(dtrain.Callback):
    """Notes the peak of each phase: from one mark to the next."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self.left: dict[str, int] = {}

    def begin(self) -> None:
        gc.collect()
        give_back_heap()
        Path("/proc/self/clear_refs").write_text("5")

    def end(self, phase: str) -> None:
        self.found[phase] = max(status("VmHWM"), self.found.get(phase, 0))
        self.left[phase] = status("VmRSS")

    def on_step_start(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        if step.number < STEPS:
            self.begin()

    def on_step_end(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        if step.number:  # the first makes the moments
            self.end("step")


def trained(make: Callable[[], torch.nn.Module], run_dir: str, peaks: Peaks, steps: int) -> None:
    """Trains so far; the last checkpoint is written at the end."""
    peaks.begin()
    with dtrain.meta_init():
        model = make()
    trainer = dtrain.Trainer(
        model,
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True),
        loss_fn,
        callbacks=[ClipGradients(1.0), peaks, Checkpoint(background=False)],
        sinks=[],
        strategy=FSDP(),
        run_dir=run_dir,
    )
    peaks.end("start")
    tokens = torch.randint(VOCABULARY, (2, 64, CONTEXT))
    peaks.begin()
    trainer.fit(TensorDataset(*tokens), batch_size=trainer.world.size, max_steps=steps)
    peaks.end("save" if steps == STEPS else "restore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=100)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    with dtrain.init(seed=0) as world, tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        at = dtrain.on_main("folder", lambda: folder)
        for size, name in ((0.1, "small"), (arguments.millions, "large")):
            peaks = Peaks()
            make = partial(Transformer, size, arguments.layers)
            for steps in (STEPS, STEPS + 1):
                trained(make, f"{at}/{name}", peaks, steps)
            gc.collect()
            give_back_heap()
            if name == "small":
                base = status("VmRSS")
            print(
                world.rank,
                name,
                {k: (v - base) // MIB for k, v in peaks.found.items()},
                {k: (v - base) // MIB for k, v in peaks.left.items()},
                base // MIB,
                flush=True,
            )
        world.comm.barrier("end")


if __name__ == "__main__":
    main()
