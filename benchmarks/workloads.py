"""Three small trainings, for benchmarks that compare loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lane import GPT, mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


@dataclass(frozen=True)
class Workload:
    """A model, data for it, and how to take turns.

    Attributes:
        make_model: the same one each time; it seeds torch's random stream.
        make_rows: inputs and labels, from their number.
        micro_batch_size: samples a rank and step.
        block: steps in a turn; each loop logs the mean loss over ranks once in a turn.
        rounds: turns of each loop, unless told otherwise.
    """

    make_model: Callable[[], nn.Module]
    make_rows: Callable[[int], tuple[Tensor, Tensor]]
    micro_batch_size: int
    block: int
    rounds: int

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make_model()

    def dataset(self, steps: int, ranks: int) -> TensorDataset:
        """Enough for so many steps of all ranks."""
        torch.manual_seed(1)
        return TensorDataset(*self.make_rows(steps * ranks * self.micro_batch_size))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


WORKLOADS = {
    "mlp": Workload(
        mlp, lambda rows: (torch.randn(rows, 64), torch.randint(10, (rows,))), 16, 50, 60
    ),
    "cnn": Workload(
        _cnn, lambda rows: (torch.randn(rows, 3, 16, 16), torch.randint(10, (rows,))), 32, 50, 20
    ),
    "gpt": Workload(
        GPT,
        lambda rows: (torch.randint(256, (rows, 64)), torch.randint(256, (rows, 64))),
        8,
        10,
        30,
    ),
}
