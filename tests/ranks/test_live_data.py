"""Samples that the live model makes are those of its weights after the step before."""

import pytest
import torch
from ahead import run_ahead
from torch import nn
from torch.utils.data import Dataset

import dtrain.trainer
from dtrain.callbacks import GradientAccumulation
from dtrain.testing import run_processes

SAMPLES, BATCH, EPOCHS = 12, 6, 3


def net():
    torch.manual_seed(3)
    return nn.Linear(2, 1).double()


def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)


def loss_fn(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


class Made(Dataset):
    """Each target is what the current weights say, and a bit more."""

    def __init__(self, model, *, whole):
        self.model = model
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(SAMPLES, 2, generator=generator).double()
        if whole:
            self.__getitems__ = lambda rows: [self[row] for row in rows]

    def __len__(self):
        return SAMPLES

    def __getitem__(self, row):
        with torch.no_grad():
            return self.x[row], self.model(self.x[row]).sin() + 0.5


def by_hand():
    """The same training without dtrain: a batch is made when its step begins."""
    model = net()
    opt = optimizer(model)
    samples = Made(model, whole=False)
    for step in range(EPOCHS * SAMPLES // BATCH):
        first = step * BATCH % SAMPLES
        parts = [samples[row] for row in range(first, first + BATCH)]
        opt.zero_grad()
        loss_fn(model, [torch.stack(part) for part in zip(*parts, strict=True)]).backward()
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train():
    dtrain.init(seed=0)
    ends = []
    for delays in (False, True):
        run_ahead(delays)
        for micros, options in [(1, {"prefetch": 0}), (1, {}), (3, {"seed_samples": True})]:
            model = net()
            trainer = dtrain.Trainer(
                model, optimizer, loss_fn, callbacks=[GradientAccumulation(micros)], sinks=[]
            )
            samples = Made(model, whole=bool(options))
            trainer.fit(dtrain.Data(samples, BATCH, shuffle=False, **options), epochs=EPOCHS)
            ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return ends


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_is_fetched_after_the_update_of_the_step_before(world_size):
    expected = by_hand()
    for ends in run_processes(train, world_size):
        assert len(ends) == 6
        for end in ends:
            torch.testing.assert_close(end, expected, rtol=1e-12, atol=0.0)
