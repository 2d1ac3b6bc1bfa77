"""The models that gpu.py trains: GPT-2, a ResNet-18 and an MLP, each from a batch to its loss."""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Shape:
    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50304
    length: int = 1024

    def flops_per_token(self, model: nn.Module) -> float:
        """Forward and backward; see gpu.py."""
        count = sum(p.numel() for p in model.parameters()) - self.length * self.width
        return 6 * count + 12 * self.layers * self.width * self.length


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, width = shape.heads, shape.width
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.before_attention(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, width / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.before_mlp(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2: learned positions, the head tied to the embedding, no dropout. Returns the loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, rows: Tensor) -> Tensor:
        x, y = rows[:, :-1], rows[:, 1:]
        hidden = self.tokens(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


class Residual(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.past: nn.Module = nn.Identity()
        if before != width or stride > 1:
            step = nn.Conv2d(before, width, 1, stride, bias=False)
            self.past = nn.Sequential(step, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(inner)) + self.past(x))


def resnet18(width: int = 64) -> nn.Module:
    """For pictures of 32 x 32: a first convolution of 3 x 3, and no pooling after it."""
    widths = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
    before = [width, *widths]
    blocks = [Residual(before[n], one, 2 if n in (2, 4, 6) else 1) for n, one in enumerate(widths)]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10),
    )  # fmt: skip


def mlp(width: int = 512) -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


class Classifier(nn.Module):
    """Returns the loss."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)


def with_code_of_its_own(model: nn.Module) -> nn.Module:
    """Has torch.compile share nothing that it makes of this model with another of its class.

    It finds what it has compiled by the code object of ``forward``. Of a graph that was captured
    for another's weights it would capture it anew in each turn.
    """
    kind = type(model)
    plain = kind.forward
    code = plain.__code__.replace(co_name=f"forward_{id(model)}")
    own = FunctionType(code, plain.__globals__, "forward", plain.__defaults__, plain.__closure__)
    model.__class__ = type(kind.__name__, (kind,), {"forward": own})
    return model


def rows_of_tokens(shape: Shape, samples: int) -> tuple[Tensor, ...]:
    return (torch.randint(shape.vocabulary, (samples, shape.length + 1)),)


def pictures(samples: int, *size: int) -> tuple[Tensor, ...]:
    return torch.randn(samples, *size), torch.randint(10, (samples,))
