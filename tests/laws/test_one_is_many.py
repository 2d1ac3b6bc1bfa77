"""Law 1: any number of ranks and micro-batches gives the parameters of one process.

float64, 50 AdamW steps with weight decay, clipping and a schedule; data that does not divide,
token weights of random length, skips by place in the data. Each tensor is within 1e-12 of its
norm; those whose true gradient is zero (a bias before a norm) are left out by name.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

import dtrain
from dtrain.callbacks import ClipGradients, GradientAccumulation, LRSchedule
from dtrain.testing import run_processes

STEPS = 50
LENGTH = 7


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.gru(x)[0])


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 6, 3, padding=1)
        self.norm = nn.GroupNorm(1, 6)
        self.head = nn.Conv1d(6, 4, 1)

    def forward(self, x):
        return self.head(F.gelu(self.norm(self.first(x.transpose(1, 2))))).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = nn.Linear(3, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.block(self.into(x)))


def perceptron():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))


MODELS = {
    "mlp": perceptron,
    "conv": Convolutional,
    "gru": Recurrent,
    "transformer": Attention,
}
# A softmax does not see a constant added to all its scores, so the keys' bias has no gradient;
# it is one third of this tensor.
ZERO_GRADIENT = {"block.self_attn.in_proj_bias"}

# World sizes and micro-batches, global batches, samples: none divides another.
CASES = [(1, 2, 7, 45), (1, 3, 16, 50), (2, 1, 7, 45), (2, 2, 16, 50), (2, 3, 9, 31)]
CASES += [(3, 1, 16, 50), (3, 2, 64, 101), (3, 3, 7, 45), (4, 1, 7, 45), (4, 2, 16, 50)]
CASES += [(4, 3, 64, 101), (4, 1, 3, 10)]  # the last: a batch smaller than the world


class SkipMarked(dtrain.Callback):
    """Skips micro-batches of one sample that is marked, wherever it lands: a weight of 0."""

    def on_batch(self, ctx, step):
        x, y, lengths = step.batch
        # A place in the data, not a rank: the marked samples weigh nothing in any split.
        lengths = torch.where(x[:, 0, 0] > 1.5, torch.zeros_like(lengths), lengths)
        if int(lengths.sum()) == 0:
            ctx.request.skip("every sample is marked")
        step.batch = (x, y, lengths)


def loss_fn(model, batch):
    x, y, lengths = batch
    mask = torch.arange(LENGTH) < lengths[:, None]
    each = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none")
    return dtrain.Loss.from_sum((each * mask).sum(), weight=mask.sum())


class Losses(dtrain.Callback):
    def __init__(self):
        self.values = []

    def on_step_end(self, ctx, step):
        self.values.append(step.loss_mean)


def train(name, micros, batch_size, samples):
    dtrain.init(seed=0)
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, LENGTH, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (samples, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (samples,), generator=generator)
    torch.manual_seed(1)
    model = MODELS[name]().double()
    losses = Losses()
    trainer = dtrain.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1),
        loss_fn,
        callbacks=[
            SkipMarked(),
            GradientAccumulation(micros),
            ClipGradients(max_norm=0.5),
            LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, steps)),
            losses,
        ],
        sinks=[],
    )
    data = torch.utils.data.TensorDataset(x, y, lengths)
    trainer.fit(data, batch_size=batch_size, max_steps=STEPS)
    return {n: p.detach().clone() for n, p in model.named_parameters()}, losses.values


def train_all(cases):
    return {(name, case): train(name, *case) for name in MODELS for case in cases}


def of_world(size):
    return [case[1:] for case in CASES if case[0] == size]


@pytest.fixture(scope="module")
def truth():
    """One process, the whole batch at once."""
    whole = sorted({(1, batch_size, samples) for _, _, batch_size, samples in CASES})
    (results,) = run_processes(train_all, 1, whole, timeout_s=100)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_parameters_are_those_of_one_process(world_size, truth):
    ranks = run_processes(train_all, world_size, of_world(world_size), timeout_s=100)
    for (name, (micros, batch_size, samples)), (params, losses) in ranks[0].items():
        case = f"{name}, {world_size} ranks x {micros}, batch {batch_size} of {samples}"
        expected, expected_losses = truth[name, (1, batch_size, samples)]
        assert losses == pytest.approx(expected_losses, rel=1e-12, abs=1e-12, nan_ok=True), case
        for tensor, value in params.items():
            if tensor in ZERO_GRADIENT:
                continue
            distance = (value - expected[tensor]).norm() / expected[tensor].norm()
            assert distance <= 1e-12, f"{case}: {tensor} is {distance:.1e} away"
        for other in ranks[1:]:
            theirs, _ = other[name, (micros, batch_size, samples)]
            assert all(torch.equal(theirs[n], value) for n, value in params.items()), case
