"""What dtrain adds to each of W real ranks; benchmarks/scale.py starts them, and shows it.

A hand-written DDP loop and dtrain train the same tiny model in the same processes, and take turns
in an order drawn anew for each round. Memory and open files are read between the stages of a
process: bare (imports only), with the hand-written loop, with dtrain beside it.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from control import Times, dataset, loss_fn
from lane import mlp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dtrain
from dtrain.callbacks import Checkpoint, ClipGradients

BATCH = 16  # samples a rank


class Plain:
    """The loop that one would write, with DistributedDataParallel where there is another rank."""

    def __init__(self, ranks: int, rank: int) -> None:
        torch.manual_seed(0)
        self.model = mlp()
        self.wrapped: nn.Module = self.model
        if ranks > 1:
            self.wrapped = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.x, self.y = dataset("mlp", ranks).tensors
        self.ranks, self.rank = ranks, rank
        self.epoch = 0

    def median_step(self, steps: int) -> float:
        """Takes some steps; returns the seconds of a median one."""
        took, total = [], torch.zeros(())
        last = time.perf_counter()
        for rows in self._batches(steps):
            self.optimizer.zero_grad(set_to_none=True)
            loss = loss_fn(self.wrapped, (self.x[rows], self.y[rows]))
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            total += loss.detach()
            now = time.perf_counter()
            took.append(now - last)
            last = now
        if self.ranks > 1:
            dist.all_reduce(total)
        assert torch.isfinite(total)
        return statistics.median(took[1:])

    def _batches(self, steps: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.x), generator=generator)[self.rank :: self.ranks]
        parts = order.split(BATCH)
        return [parts[step % len(parts)] for step in range(steps)]


class WithDtrain:
    """The same training with dtrain, in fits of a few more steps."""

    def __init__(self, world: dtrain.World, run_dir: Path | None = None) -> None:
        torch.manual_seed(0)
        model = mlp()
        self.times = Times()
        saving = [] if run_dir is None else [Checkpoint(every_steps=10**9)]
        self.trainer = dtrain.Trainer(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
            loss_fn,
            callbacks=[ClipGradients(1.0), *saving, self.times],
            sinks=[],
            strategy="ddp",  # as the other loop
            run_dir=run_dir,
            # More ranks than cores: a rank may well not run for seconds.
            hang_after_s=60.0,
        )
        # Tensors are fetched whole, as the other loop does.
        self.data = dtrain.Data(dataset("mlp", world.size).tensors, BATCH * world.size)

    def median_step(self, steps: int) -> float:
        """Takes some steps; returns the seconds of a median one."""
        self.trainer.fit(
            self.data,
            max_steps=self.trainer.context.progress.step + steps,
            log_every=steps,
        )
        return statistics.median(self.times.seconds)


def sizes() -> dict[str, float]:
    """Returns what this process holds: MiB of memory, open files, threads."""
    gc.collect()
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, kib, *_ = line.split()
        fields[name.rstrip(":")] = int(kib) / 1024
    return {
        "rss": fields["Rss"],
        "uss": fields["Private_Clean"] + fields["Private_Dirty"],
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def median_of(call: Callable[[], object], times: int) -> float:
    """Returns the seconds that a median call takes."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def once(call: Callable[[], Any]) -> tuple[Any, float]:
    """Returns what a call returns, and its seconds, after all ranks have come."""
    if dist.is_initialized():
        dist.barrier()
    began = time.perf_counter()
    value = call()
    return value, time.perf_counter() - began


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """Returns one rank's figures; all ranks call it."""
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    held = {"bare": sizes()}
    found: dict[str, Any] = {"ranks": ranks}
    if ranks > 1:
        _, found["torch_group_s"] = once(lambda: dist.init_process_group("gloo"))
    warm_up = max(4, min(10, 160 // ranks))
    plain = Plain(ranks, rank)
    plain.median_step(warm_up)
    held["plain"] = sizes()
    world, found["init_s"] = once(lambda: dtrain.init(seed=0))
    held["init"] = sizes()
    trained, found["trainer_s"] = once(lambda: WithDtrain(world))
    _, found["first_fit_s"] = once(lambda: trained.median_step(warm_up))
    held["trainer"] = sizes()
    if rounds:
        loops = {"plain": plain, "again": Plain(ranks, rank), "dtrain": trained}
        found["seconds"] = _take_turns(loops, rounds, steps)
        _, found["fit_s"] = once(lambda: trained.median_step(2))
    calls = max(5, 40 // ranks)
    if ranks > 1:
        found["barrier_torch_s"] = median_of(dist.barrier, calls)
        few = torch.zeros(4)
        found["all_reduce_torch_s"] = median_of(lambda: dist.all_reduce(few), calls)
    found["verb_s"] = median_of(lambda: world.comm.barrier("here"), calls)
    said = {"name": "x" * 200}
    found["gather_objects_s"] = median_of(lambda: world.comm.gather_objects("said", said), calls)
    folder = world.comm.on_main("folder", lambda: tempfile.mkdtemp(prefix="dtrain-scale-"))
    saver, _ = once(lambda: WithDtrain(world, Path(folder)))
    _, found["fit_and_save_s"] = once(lambda: saver.median_step(2))
    held["saved"] = sizes()
    saved = next((Path(folder) / "checkpoints").glob("step-*"))
    found["saved_files"] = len(list(saved.iterdir()))
    found["saved_bytes_a_rank"] = sum(f.stat().st_size for f in saved.glob("rank-00000*"))
    world.comm.barrier("looked")
    if world.is_main:
        _remove(Path(folder))
    found["held"] = held
    world.close()
    return found


def _take_turns(loops: dict[str, Any], rounds: int, steps: int) -> dict[str, list[float]]:
    order = random.Random(0)  # alike on all ranks
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    # One round to warm up; where many ranks share few cores, all have warmed up before.
    for number in range(0 if rounds < 3 else -1, rounds):
        for name in order.sample(list(loops), len(loops)):
            took, _ = once(lambda loop=loops[name]: loop.median_step(steps))
            if number >= 0:
                seconds[name].append(took)
    return seconds


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
