"""A tiny training that tests vary: data, model, loss, and a callback that records."""

import hashlib

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dtrain


def dataset(samples=96, features=8):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, features, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long()
    return TensorDataset(x, y)


def model(features=8, dtype=torch.float32):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, 2))
    return net.to(dtype)


def loss_fn(net, batch):
    x, y = batch
    logits = net(x)
    accuracy = (logits.argmax(-1) == y).float().mean()
    return dtrain.Loss(F.cross_entropy(logits, y), metrics={"accuracy": accuracy})


def adam(net, **options):
    return torch.optim.AdamW(net.parameters(), lr=1e-2, **options)


class Words(dtrain.Sink):
    """Keeps what a person is told; of one kind of reports, if that is given."""

    def __init__(self, kind=None):
        self.kind, self.words = kind, []

    def write(self, report):
        if self.kind in (None, report.kind):
            self.words.append(report.text)


def trainer(callbacks=(), *, net=None, optimizer=adam, loss=loss_fn, **options):
    """A Trainer that prints nothing."""
    dtrain.init(seed=0)
    return dtrain.Trainer(net or model(), optimizer, loss, callbacks=callbacks, sinks=[], **options)


def digest(net):
    """A digest of all parameters and buffers, to compare them bit for bit."""
    sha = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().double().numpy().tobytes())
    return sha.hexdigest()


class Record(dtrain.Callback):
    """Keeps the loss and the applied updates of every step."""

    def __init__(self):
        self.losses = []
        self.applied = []

    def on_step_end(self, ctx, step):
        self.losses.append(step.loss_mean)
        self.applied.append(step.applied)
