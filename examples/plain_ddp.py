"""The training of examples/digits.py written by hand, without dtrain: plain torch and DDP.

    python examples/plain_ddp.py
    bash launch/torchrun.sh examples/plain_ddp.py

It has gradient accumulation, clipping, a schedule, the loss over all ranks and an exact
evaluation; it has no checkpoints, no resume, no mixed precision and no early stopping.
"""

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset


def load_data():
    """Returns 1437 images to train on and 360 to evaluate on, always the same ones."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
    y = torch.tensor(digits.target)
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, val = shuffled[:1437], shuffled[1437:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[val], y[val])


def make_model():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),  # [n, 64 * 4 * 4]
        nn.Linear(64 * 4 * 4, 10),
    )


def train(
    model,
    train_set,
    order,
    *,
    epochs,
    batch_size,
    micro_steps=1,
    lr=5e-3,
    max_norm=1.0,
    after_epoch=lambda epoch, loss: None,
):
    """Trains ``model`` in place.

    Args:
        model: equal on all ranks, on this rank's device.
        train_set: a dataset with a length and ``__getitem__``.
        order: from the epoch's number to the samples' order in it; equal on all ranks.
        epochs: how many.
        batch_size: samples in a step, over all ranks.
        micro_steps: into how many micro-batches a rank's share is split.
        lr: the peak of the one-cycle schedule.
        max_norm: of the gradient of the whole batch.
        after_epoch: called with the epoch's number and its mean loss.

    Returns:
        The mean loss over all ranks of each step.
    """
    rank, world_size, device = where_am_i()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    steps_per_epoch = -(-len(train_set) // batch_size)
    scheduler = OneCycleLR(optimizer, lr, total_steps=epochs * steps_per_epoch)
    replica = model
    if world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        replica = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    losses = []  # tensors: reading them here would make the CPU wait for the GPU in each step
    for epoch in range(epochs):
        model.train()
        samples = torch.as_tensor(order(epoch))
        for batch in samples.split(batch_size):
            # Contiguous slices; where it does not divide, the first ones have one sample more.
            share = batch.tensor_split(world_size)[rank]
            micro_batches = share.tensor_split(micro_steps)
            optimizer.zero_grad(set_to_none=True)
            loss_mean = torch.zeros((), device=device)
            for i, rows in enumerate(micro_batches):
                x, y = fetch(train_set, rows, device)
                last = i == len(micro_batches) - 1
                with nullcontext() if last or world_size == 1 else replica.no_sync():
                    # DDP takes the mean over ranks, whose shares may differ: with the sum over
                    # samples, and the division by the whole batch, it is right all the same.
                    loss_sum = F.cross_entropy(replica(x), y, reduction="sum")
                    loss = loss_sum * (world_size / len(batch))
                    loss.backward()
                loss_mean += loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            scheduler.step()
            if world_size > 1:
                dist.all_reduce(loss_mean)
            losses.append(loss_mean / world_size)
        after_epoch(epoch, torch.stack(losses[-steps_per_epoch:]).mean().item())
    return torch.stack(losses).tolist()


@torch.no_grad()
def evaluate(model, val_set, *, batch_size):
    """Returns mean loss and accuracy over ``val_set``, each sample once; equal on all ranks."""
    rank, world_size, device = where_am_i()
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    share = torch.arange(len(val_set)).tensor_split(world_size)[rank]  # no padding, no repeats
    for rows in share.split(batch_size):
        x, y = fetch(val_set, rows, device)
        logits = model(x)
        sums[0] += F.cross_entropy(logits, y, reduction="sum")
        sums[1] += (logits.argmax(-1) == y).sum()
    if world_size > 1:
        dist.all_reduce(sums)
    loss, accuracy = (sums / len(val_set)).tolist()
    return loss, accuracy


def fetch(dataset, rows, device):
    x, y = dataset[rows]
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def where_am_i():
    """Returns this rank, the world size and this rank's device."""
    alone = not dist.is_initialized()
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    else:
        device = torch.device("cpu")
    return (0, 1, device) if alone else (dist.get_rank(), dist.get_world_size(), device)


def main():
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, _, device = where_am_i()
    torch.manual_seed(0)  # equal on all ranks: they make equal models
    model = make_model().to(device)
    train_set, val_set = load_data()

    def order(epoch):
        generator = torch.Generator().manual_seed(epoch)
        return torch.randperm(len(train_set), generator=generator).tolist()

    def report(epoch, train_loss):
        loss, accuracy = evaluate(model, val_set, batch_size=64)
        if rank == 0:
            print(f"epoch {epoch + 1}  loss {train_loss:.4f}  eval/loss {loss:.4f}  {accuracy:.2%}")

    train(model, train_set, order, epochs=12, batch_size=64, after_epoch=report)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
