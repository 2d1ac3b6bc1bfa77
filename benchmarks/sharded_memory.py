"""What memory a rank of a sharded model takes at most, against the arithmetic of docs/sharded.md.

    MALLOC_MMAP_THRESHOLD_=1048576 RANKS=2 launch/torchrun.sh benchmarks/sharded_memory.py

A transformer in float32 with AdamW, in batches of one sample of a few tokens, so that activations
are small. It is started from dtrain.meta_init, trained, saved, and restored by another Trainer. The
peak of each phase is the kernel's (VmHWM, which is reset before it), less what the process had once
a small model had gone through all of that: torch, gloo and all that is imported. Without the
variable, glibc's heap keeps what large tensors leave, and the peaks are not those of tensors.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from sharded import VOCABULARY, Transformer, loss_fn
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.accelerator import give_back_heap
from dtrain.callbacks import Checkpoint, ClipGradients
from dtrain.strategies import FSDP

CONTEXT, STEPS = 4, 3
MIB = 2**20


def status(name: str) -> int:
    """Returns a number of bytes that the kernel tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Peaks(dtrain.Callback):
    """Notes the peak of each phase."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    def begin(self) -> None:
        gc.collect()
        give_back_heap()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now

    def end(self, phase: str) -> None:
        self.found[phase] = max(status("VmHWM"), self.found.get(phase, 0))
        self.begin()

    def on_step_start(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        if step.number == STEPS:  # of the second Trainer
            self.end("restore")

    def on_step_end(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        self.end("step")


def trained(make: Callable[[], nn.Module], run_dir: str, peaks: Peaks, steps: int) -> None:
    """Trains so far, and saves."""
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
    trainer.fit(TensorDataset(*tokens), batch_size=trainer.world.size, max_steps=steps)
    peaks.end("save")


def arithmetic(model: Transformer, ranks: int) -> dict[str, int]:
    """Returns the bytes of each phase, as docs/sharded.md has them."""
    count = sum(p.numel() for p in model.parameters())
    largest = 4 * max(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.blocks[0].parameters())
    share = count // ranks
    return {
        "start": 4 * share + largest,
        "step": 16 * share + 12 * block,
        "save": (16 + 12) * share + largest,
        "restore": 12 * share + largest // ranks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, default=100)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    with dtrain.init(seed=0) as world, tempfile.TemporaryDirectory() as own:
        torch.set_num_threads(1)
        folder, base, peaks = dtrain.on_main("folder", lambda: own), 0, Peaks()
        for millions in (0.1, arguments.millions):
            base, peaks = status("VmRSS"), Peaks()

            def make(size: float = millions) -> Transformer:
                return Transformer(size, arguments.layers)

            for steps in (STEPS, STEPS + 1):
                trained(make, f"{folder}/{millions}", peaks, steps)
            peaks.begin()
        with torch.device("meta"):
            expected = arithmetic(Transformer(arguments.millions, arguments.layers), world.size)
        everyones = world.comm.gather_objects("peaks", peaks.found | {"base": base})
        for phase, size in expected.items() if world.is_main else ():
            most = max(one[phase] - one["base"] for one in everyones)
            print(
                f"{phase:8} {most / MIB:7.0f} MiB, {most / size:.3f} of {size / MIB:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
