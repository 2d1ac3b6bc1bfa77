"""A training of one update a step, and one of two, for laws that hold for both."""

import torch
from torch.nn import functional as F


def loss_fn(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def two_losses(net, batch):
    """The second is that of what the first update made of the first layer."""
    yield "first", loss_fn(net, batch)
    yield "last", loss_fn(net, batch)


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=1e-2)


#: Optimizers and loss function, by how many updates a step has.
JOBS = {
    1: (adamw, loss_fn),
    2: (lambda net: {"first": adamw(net[0]), "last": adamw(net[-1])}, two_losses),
}
