"""The loops that one would write without a framework: a plain one, and one with every trick.

Each is a generator that takes one block of steps each time it is asked for the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    TensorDataset,
)
from workloads import Workload, loss_of

from dtrain.distributed.transport import yielding_threads


def plain(workload: Workload, dataset: TensorDataset, log: TextIO) -> Iterator[None]:
    """With torch's defaults, as in its tutorials."""
    model = workload.model()
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None
    replica = DistributedDataParallel(model, process_group=group) if group else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = LinearLR(optimizer, total_iters=1000)
    loader = DataLoader(dataset, workload.micro_batch_size, sampler=sampler_of(dataset))
    return train(workload, loader, replica, optimizer, scheduler, group, log)


def tuned(workload: Workload, dataset: TensorDataset, log: TextIO) -> Iterator[None]:
    """A fused optimizer, batches that are fetched whole, and DDP without what it need not do.

    Its process group is opened as dtrain opens its own.
    """
    model = workload.model()
    group = None
    replica: nn.Module = model
    if dist.is_initialized():
        with yielding_threads():
            group = dist.new_group(backend="gloo")
        # The models have no buffers, so that sending them costs nothing.
        replica = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scheduler = LinearLR(optimizer, total_iters=1000)
    batches = BatchSampler(sampler_of(dataset), workload.micro_batch_size, drop_last=False)
    loader = DataLoader(Whole(dataset), batch_size=None, sampler=batches)
    return train(workload, loader, replica, optimizer, scheduler, group, log)


class Whole(torch.utils.data.Dataset[tuple[Tensor, ...]]):
    """Gives all samples of a batch at once."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.tensors = dataset.tensors

    def __getitem__(self, places: list[int]) -> tuple[Tensor, ...]:
        rows = torch.tensor(places)
        return tuple(tensor[rows] for tensor in self.tensors)


def sampler_of(dataset: TensorDataset) -> Sampler[int]:
    if dist.is_initialized():
        return DistributedSampler(dataset, shuffle=True)
    return RandomSampler(dataset)


def train(
    workload: Workload,
    loader: DataLoader[Any],
    replica: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LinearLR,
    group: dist.ProcessGroup | None,
    log: TextIO,
) -> Iterator[None]:
    step, total = 0, torch.zeros(())
    while True:
        for batch in loader:
            optimizer.zero_grad()
            loss = loss_of(replica, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(replica.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            total += loss.detach()
            step += 1
            if step % workload.block == 0:
                if group is not None:
                    dist.all_reduce(total, group=group)
                    total /= dist.get_world_size()
                log.write(json.dumps({"step": step, "loss": total.item() / workload.block}) + "\n")
                log.flush()
                total.zero_()
                yield


LOOPS = {"plain": plain, "tuned": tuned}
