"""Models with blocks, and their training in many cases, for tests of sharded strategies."""

from dataclasses import dataclass

import torch
from torch import nn

import dtrain
from dtrain.callbacks import ClipGradients, GradientAccumulation
from dtrain.strategies import FSDP

WIDTH = 7  # a multiple of no number of ranks


class Block(nn.Module):
    def __init__(self, hidden=5):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.a = nn.Linear(WIDTH, hidden)
        self.b = nn.Linear(hidden, WIDTH)

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(self.norm(x))))


class Net(nn.Module):
    """A layer, blocks, and a head of fewer rows than there may be ranks."""

    def __init__(self, blocks=3, out=2):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, out)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Odd(nn.Module):
    """A first block whose input needs no gradient; one called twice; one without gradients, too.

    The embedding is tied to the head, a layer is frozen, and a buffer counts.
    """

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, 11)
        self.head.weight = self.table.weight
        self.out = nn.Linear(11, 2)

    def forward(self, x):
        with torch.no_grad():
            teacher = self.blocks[0](x)
        h = self.blocks[0](x) + self.table((x[:, 0].abs() * 5).long().clamp(max=10))
        for block in (self.blocks[1], self.blocks[2], self.blocks[1]):
            h = block(self.frozen(h))
        return self.out(self.head(h)) + 0.1 * teacher.sum(-1, keepdim=True)


@dataclass
class Box:
    x: torch.Tensor


class Boxed(nn.Module):
    """Takes and returns something that is no tensor."""

    def __init__(self):
        super().__init__()
        self.inner = Block()

    def forward(self, box, *, scale):
        return Box(self.inner(box.x) * scale)


class Boxes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Boxed() for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        box = Box(self.first(x))
        for block in self.blocks:
            box = block(box, scale=0.9)
        return self.head(box.x)


MODELS = {"net": Net, "odd": Odd, "boxes": Boxes}


def dataset(samples=23):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.randn(samples, 2, generator=generator, dtype=torch.float64)
    return torch.utils.data.TensorDataset(x, y, torch.arange(samples))


def loss_fn(model, batch):
    """Weighted by tokens, as it were: samples weigh 1 to 3."""
    x, y, number = batch
    each = ((model(x) - y) ** 2).mean(-1)
    weights = 1.0 + (number % 3).double()
    return dtrain.Loss((each * weights).sum() / weights.sum(), weight=weights.sum())


def make(name="net"):
    torch.manual_seed(1)
    model = MODELS[name]().double()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def whole(model):
    """Returns the parameters by name. Ranks: all, communicates."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p.clone()) for n, p in named.items()
    }


def trainer(strategy, *, model="net", micros=1, loss=loss_fn, callbacks=(), net=None, **more):
    made, optimizer = make(model) if net is None else net
    every = [ClipGradients(0.5), *callbacks]
    if micros > 1:
        every.append(GradientAccumulation(micros))
    options = {"callbacks": every, "sinks": [], "strategy": strategy, "hang_after_s": 20.0}
    return dtrain.Trainer(made, optimizer, loss, **options | more)


def distance(found, expected):
    return max(
        ((found[name] - value).norm() / value.norm().clamp(min=1e-30)).item()
        for name, value in expected.items()
    )


def strategy_of(name, **options):
    return FSDP(**options) if name == "fsdp" else name
