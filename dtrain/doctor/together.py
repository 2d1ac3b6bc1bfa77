"""What ranks can only see together: clocks, one folder, how quick the network is, a real step."""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from dtrain.callbacks import Checkpoint, ClipGradients
from dtrain.checkpoint import check_shared
from dtrain.data import Data
from dtrain.distributed import World
from dtrain.doctor.findings import Finding
from dtrain.errors import DtrainError, RankMismatch
from dtrain.trainer import Trainer

_SIZES = (4, 2**10, 2**20, 16 * 2**20)  # in bytes
_ON_GPUS = (*_SIZES, 256 * 2**20)
_TIMES = 7
_APART_S = 2.0  # by so much clocks differ too much
_TOO_FAR_S = 10.0


def clocks(world: World) -> Iterator[Finding]:
    """Compares the ranks' clocks. Ranks: all, communicates."""
    tries = []
    for _ in range(3):  # the closest of some: a rank may be late to look
        world.comm.barrier("clocks")
        told = world.comm.gather_objects("clocks", time.time())
        tries.append([one - told[0] for one in told])
    apart = [min((one[rank] for one in tries), key=abs) for rank in range(world.size)]
    worst = max(range(world.size), key=lambda rank: abs(apart[rank]))
    words = f"at most {abs(apart[worst]):.2f} s apart"
    if abs(apart[worst]) < _APART_S:
        yield Finding("fine", "clocks", words)
        return
    hosts = world.comm.gather_objects("hosts", world.host)
    yield Finding(
        "wrong" if abs(apart[worst]) >= _TOO_FAR_S else "note",
        "clocks",
        f"rank {worst} on {hosts[worst]} is {abs(apart[worst]):.1f} s "
        f"{'ahead of' if apart[worst] > 0 else 'behind'} rank 0 on {hosts[0]}",
        "set them by NTP or chrony: torchrun's agents give up a node whose clock is some seconds "
        "off, and files of one host look newer than they are",
    )


def one_folder(run_dir: Path, world: World) -> Iterator[Finding]:
    """Looks whether all ranks see one ``run_dir``. Ranks: all, communicates."""
    try:
        check_shared(run_dir, world)
    except RankMismatch as error:
        yield Finding("wrong", "shared folder", str(error).partition("\n")[0])
    else:
        yield Finding("fine", "shared folder", f"all ranks see {run_dir}")


def network(world: World) -> Iterator[Finding]:
    """Times the sum over ranks of some sizes. Ranks: all, communicates."""
    on_gpu = world.device.type != "cpu"
    for size in _ON_GPUS if on_gpu else _SIZES:
        tensor = torch.zeros(size // 4, device=world.device)
        times = []
        for _ in range(_TIMES):
            world.comm.barrier("all-reduce")
            began = time.perf_counter()
            world.gradients.all_reduce(tensor)
            # Read back: on a device it is only begun.
            float(tensor[0])
            times.append(time.perf_counter() - began)
        took_s = statistics.median(times[1:])
        # What each rank must send at least, and receive (Patarasuk and Yuan, 2009).
        moved = 2 * (world.size - 1) / world.size * size
        words = f"{_bytes(size)} in {took_s * 1e3:.2f} ms"
        if size >= 2**20:
            words += f", {moved / took_s / 1e9:.2f} GB/s of each rank"
        yield Finding("fine", "all-reduce", f"{words} ({world.backend})")


def a_real_step(run_dir: Path, world: World) -> Iterator[Finding]:
    """Trains, evaluates and saves, in a folder that goes again. Ranks: all, communicates."""
    folder = world.comm.on_main(
        "a folder", lambda: tempfile.mkdtemp(prefix=".doctor-", dir=run_dir)
    )
    began = time.perf_counter()
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def loss_fn(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    try:
        Trainer(
            model,
            torch.optim.AdamW(model.parameters()),
            loss_fn,
            callbacks=[ClipGradients(1.0), Checkpoint()],
            sinks=[],
            run_dir=folder,
        ).fit(Data(data, batch_size=16), epochs=1, eval_set=data)
    except (DtrainError, RuntimeError, OSError) as error:
        told = f"{type(error).__name__}: {error}".partition("\n")[0]
        yield Finding("wrong", "a real step", told, "the traceback of a script says where")
    else:
        took_s = time.perf_counter() - began
        words = f"4 steps, an evaluation and a checkpoint in {took_s:.1f} s"
        yield Finding("fine", "a real step", words)
    finally:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def ranks(world: World) -> Finding:
    """Says which ranks there are. Ranks: all, communicates."""
    told = world.comm.gather_objects("ranks", (world.host, str(world.device), os.getpid()))
    hosts: dict[str, list[str]] = {}
    for host, device, _ in told:
        hosts.setdefault(host, []).append(device.partition(":")[0])
    each = ", ".join(f"{len(d)} on {host} ({d[0]})" for host, d in list(hosts.items())[:16])
    more = f" and {len(hosts) - 16} more hosts" if len(hosts) > 16 else ""
    return Finding("fine", "ranks", f"{world.size}, started by {world.launcher}: {each}{more}")


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count // size} {unit}"
    return f"{count} bytes"
