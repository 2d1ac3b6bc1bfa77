"""What a checkpoint of 1 GB costs the training: against a memory copy, torch.save and torch's DCP.

    RANKS=2 launch/torchrun.sh benchmarks/checkpoint.py

Each step of a real run is a round: the whole state (parameters and AdamW's moments) is copied into
memory that is there already; then dtrain saves beside the training; then torch.save does on rank 0,
while the others wait; then torch.distributed.checkpoint (DCP) does beside the training, to
safetensors. Each writes down to the disk. A figure is the median over rounds of its ratio to the
copy of the same round, on the slowest rank. At the end one rank loads what was saved last.

    RANKS=1 launch/torchrun.sh benchmarks/checkpoint.py --foreground
    RANKS=1 launch/torchrun.sh benchmarks/checkpoint.py --steps

``--foreground`` has the training wait for the disk, and gives dtrain's ratio to torch.save.
``--steps`` compares steps during which 0.5 GB are written with those after it, in turns: of many
small operations, which want the interpreter's lock, on one core; and of few large, on all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import Checkpoint
from dtrain.checkpoint import format as files

WIDTH, LAYERS = 4096, 5


def flat(trainer: dtrain.Trainer) -> dict[str, Tensor]:
    """Returns all tensors of model and optimizer, by name."""
    tensors = {f"model.{name}": t for name, t in trainer.model.state_dict().items()}
    for number, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": t for name, t in state.items()}
    return tensors


class Rounds(dtrain.Callback):
    """Before a step whose predecessor was saved, the others have their turns."""

    def __init__(self, folder: Path, world: dtrain.World) -> None:
        self.folder, self.world = folder, world
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self.copies: dict[str, Tensor] = {}
        self.began = 0.0
        self.rounds: list[dict[str, float]] = []

    def timed(self, ctx: dtrain.Context, act: Callable[[], Any]) -> float:
        """Returns how long ``act`` takes; all ranks begin together."""
        ctx.comm.barrier("begin")
        began = time.perf_counter()
        act()
        return time.perf_counter() - began

    def on_save(self, ctx: dtrain.Context) -> None:
        tensors = flat(self.trainer)
        if not self.copies:
            self.copies = {name: t.clone() for name, t in tensors.items()}
        copy = self.timed(ctx, lambda: [self.copies[n].copy_(t) for n, t in tensors.items()])
        self.rounds.append({"copy": copy})
        ctx.comm.barrier("begin")
        self.began = time.perf_counter()

    def on_step_start(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        if not self.began:
            return
        now = self.rounds[-1]
        now["dtrain: stall"] = time.perf_counter() - self.began
        self.trainer._files.saver.finish()
        now["dtrain: written"] = time.perf_counter() - self.began
        assert self.trainer._files.saver.failure is None
        self.began = 0.0

        def save() -> None:
            if self.world.is_main:
                with open(self.folder / "torch.pt", "wb") as file:
                    torch.save(flat(self.trainer), file)
                    os.fsync(file.fileno())
            ctx.comm.barrier("saved")

        now["torch.save"] = self.timed(ctx, save)
        if self.world.size > 1:
            self.save_with_dcp(ctx, now)

    def save_with_dcp(self, ctx: dtrain.Context, now: dict[str, float]) -> None:
        place = self.folder / "dcp"
        if self.world.is_main:
            shutil.rmtree(place, ignore_errors=True)
        ctx.comm.barrier("begin")
        began = time.perf_counter()
        writing = dcp.async_save(
            flat(self.trainer),
            storage_writer=HuggingFaceStorageWriter(str(place), save_distributed=True),
            process_group=self.group,
        )
        now["DCP: stall"] = time.perf_counter() - began
        writing.result()
        for file in place.glob(f"shard-{self.world.rank + 1:05d}*"):
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        ctx.comm.barrier("written")
        now["DCP: written"] = time.perf_counter() - began


class Beside(dtrain.Callback):
    """Times steps, and asks for a checkpoint after as many alone as were beside the last one."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.beside: list[list[float]] = [[]]
        self.alone: list[list[float]] = [[]]
        self.began = 0.0

    def writes(self) -> bool:
        thread = self.trainer._files.saver._thread
        return thread is not None and thread.is_alive()

    def on_step_start(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        self.wrote, self.began = self.writes(), time.perf_counter()

    def on_step_end(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        took = time.perf_counter() - self.began
        if self.wrote:
            self.beside[-1].append(took)
        elif len(self.alone[-1]) < 20 + len(self.beside[-1]):
            self.alone[-1].append(took)
        elif len(self.beside) > self.rounds + 1:
            ctx.request.stop("enough")
        else:
            self.beside.append([])
            self.alone.append([])
            ctx.request.save("the next round")


def time_steps(folder: Path, rounds: int) -> None:
    """Prints how much longer steps take while 0.5 GB are written."""
    small, large = torch.randn(64), torch.randn(1024, 1024)

    def many(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        for _ in range(2000):
            small.mul_(1.0)
        return model(batch[0]).square().mean()

    def one(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        for _ in range(8):
            torch.mm(large, large)
        return model(batch[0]).square().mean()

    threads = torch.get_num_threads()
    for name, loss_fn, cores in (("many small", many, 1), ("few large", one, threads)):
        torch.set_num_threads(cores)
        model = nn.Linear(8, 8)
        for number in range(8):
            model.register_buffer(f"held{number}", torch.randn(WIDTH, WIDTH))
        beside = Beside(rounds)
        beside.trainer = trainer = dtrain.Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=1e-5),
            loss_fn,
            callbacks=[Checkpoint(every_epochs=1, keep=1), beside],
            sinks=[],
            run_dir=folder / name,
            hang_after_s=None,
        )
        trainer.fit(TensorDataset(torch.randn(100_000, 8)), batch_size=1, epochs=1, log_every=10**6)
        ratios = sorted(
            statistics.fmean(b) / statistics.fmean(a)
            for b, a in list(zip(beside.beside, beside.alone, strict=True))[1:]
            if b
        )
        print(
            f"{name} operations, {cores} threads: steps of"
            f" {1e3 * statistics.median(beside.alone[1]):.1f} ms take"
            f" {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) as long beside"
            f" a save; {statistics.median(map(len, beside.beside[1:]))} of them a save"
        )


def load_times(folder: Path) -> dict[str, float]:
    """Returns how long it takes one rank to read what was saved last."""
    began = time.perf_counter()
    saved, _ = files.find(folder / "run" / "checkpoints")
    assert saved is not None
    checked = time.perf_counter()
    model, state = files.load_model(saved.path), files.load_state(saved.path)["optimizer"]["state"]
    of_optimizer = [t for values in state.values() for t in values.values()]
    seen = sum(t.numel() for t in [t.clone() for t in [*model.values(), *of_optimizer]])
    done = time.perf_counter()
    loaded = torch.load(folder / "torch.pt")  # noqa: TID251 -- it is what is compared
    assert seen == sum(t.numel() for t in [t.clone() for t in loaded.values()])
    return {
        "dtrain, every byte checked": done - began,
        "of which checking": checked - began,
        "torch.load": time.perf_counter() - done,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--foreground", action="store_true", help="wait for the disk")
    parser.add_argument("--steps", action="store_true", help="time steps beside a save")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    arguments = parser.parse_args()
    world = dtrain.init(seed=0)
    folder = dtrain.on_main(
        "folder", lambda: Path(tempfile.mkdtemp(prefix="dtrain-", dir=arguments.folder))
    )
    if arguments.steps:
        time_steps(folder, arguments.rounds)
        shutil.rmtree(folder)
        world.close()
        return
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    rounds = Rounds(folder, world)
    rounds.trainer = trainer = dtrain.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-5),
        lambda model, batch: model(batch[0]).square().mean(),
        callbacks=[
            Checkpoint(every_steps=1, keep=1, background=not arguments.foreground),
            rounds,
        ],
        sinks=[],
        run_dir=folder / "run",
        hang_after_s=None,
    )
    data = TensorDataset(torch.randn(2 * world.size * (arguments.rounds + 1), WIDTH))
    trainer.fit(data, batch_size=2 * world.size, epochs=1, log_every=1000)
    mine = [now for now in rounds.rounds if len(now) > 1]
    slowest = [
        {name: max(one[i][name] for one in everyones) for name in mine[i]}
        for everyones in [world.comm.gather_objects("rounds", mine)]
        for i in range(len(mine))
    ]
    if world.is_main:
        size = sum(t.nbytes for t in flat(trainer).values())
        print(f"{size / 1e9:.2f} GB on {world.size} ranks, {len(slowest)} rounds")
        first, *rest = slowest
        for name in first:
            ratios = sorted(now[name] / now["copy"] for now in rest)
            print(
                f"{name:16} {statistics.median(ratios):7.2f} copies"
                f" ({ratios[0]:.2f} to {ratios[-1]:.2f}); the first time {first[name]:.2f} s,"
                f" then {statistics.median(now[name] for now in rest):.3f} s"
            )
        for name in ("dtrain: stall", "dtrain: written"):
            ratios = sorted(now[name] / now["torch.save"] for now in rest)
            print(
                f"{name}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                " of torch.save and fsync"
            )
        for name, seconds in load_times(folder).items():
            print(f"loading: {name}: {seconds:.2f} s")
        shutil.rmtree(folder)
    world.comm.barrier("end")
    world.close()


if __name__ == "__main__":
    main()
