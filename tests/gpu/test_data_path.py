"""Batches on the device: the right numbers, kept as long as anybody likes, and not waited for."""

from contextlib import nullcontext

import pytest
import torch
from test_no_sync import no_sync
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from dtrain.data import Data, open_feed
from dtrain.distributed import Comm, World

ROWS, BATCH, WIDTH = 1024 + 20, 64, 512
X = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(7))
Y, STEPS = torch.arange(ROWS), -(-ROWS // BATCH)


class Parts(IterableDataset):
    def __iter__(self):
        return zip(X.split(BATCH), Y.split(BATCH), strict=True)


class Doubled(TensorDataset):
    """Not known to be made of arrays: collated from samples."""


KINDS = {
    "arrays": lambda device: Data(TensorDataset(X, Y), BATCH),
    "numpy": lambda device: Data((X.numpy(), Y.numpy()), BATCH),
    "on the card": lambda device: Data(TensorDataset(X.to(device), Y.to(device)), BATCH),
    "here and there": lambda device: Data(TensorDataset(X, Y.to(device)), BATCH),
    "a subset": lambda device: Data(
        Subset(TensorDataset(X.to(device), Y.to(device)), range(-ROWS, 0)), BATCH
    ),
    "collated": lambda device: Data(Doubled(X, Y), BATCH),
    "workers": lambda device: Data(Doubled(X, Y), BATCH, num_workers=2),
    "a stream": lambda device: Data([*Parts()]),
    "pinned by its loader": lambda device: Data(
        DataLoader(Parts(), batch_size=None, pin_memory=device.type == "cuda")
    ),
}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_right_and_not_waited_for(device, kind, kept):
    world = World(0, 0, 1, "here", device, "none", "solo", 0, Comm())
    feed = open_feed(KINDS[kind](device), world, lambda share: [share])
    weight = torch.randn(WIDTH, WIDTH, device=device) / WIDTH
    seen, batches = [], []

    delay = 100 if device.type == "cuda" else 1  # what follows comes late on the device
    for epoch in range(2):
        for _, step in zip(range(STEPS), feed.epoch(epoch, 0), strict=False):
            with no_sync(device) if epoch else nullcontext():
                (x, y), samples = step.next()
                busy = x
                for _ in range(delay):
                    busy = busy @ weight
                seen.append((x.sum(1), y.clone(), busy.sum(), samples))
            if kept:
                batches.append((x, y))
            del x, y, busy
    assert len(seen) == 2 * STEPS
    for sums, y, _, samples in seen:
        y = y.cpu()
        assert len(y) == samples
        assert torch.allclose(sums.cpu(), X[y].sum(1), atol=1e-4)
    for x, y in batches:
        assert torch.equal(x.cpu(), X[y.cpu()])
    for epoch in (seen[:STEPS], seen[STEPS:]):
        assert torch.cat([y.cpu() for _, y, *_ in epoch]).sort().values.tolist() == Y.tolist()
