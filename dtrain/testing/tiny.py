"""A training of a few milliseconds, to try callbacks in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import Dataset, TensorDataset

from dtrain.callback import Callback
from dtrain.context import Context, Loss, Step
from dtrain.data import Data
from dtrain.distributed import init, tensors_of_state
from dtrain.plan import FitResult
from dtrain.sinks import Sink
from dtrain.trainer import Trainer


@dataclass(frozen=True, slots=True)
class TinyFit:
    """What became of a tiny training, on one rank."""

    result: FitResult  # what fit returned
    losses: list[float]  # of each step, over the global batch
    applied: list[bool]  # of each step, whether the parameters were updated
    weights: dict[str, Tensor]  # the model's parameters and buffers at the end, by name


def tiny_fit(
    callbacks: Sequence[Callback] = (),
    *,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = 12,
    samples: int = 48,
    model: Callable[[], nn.Module] | None = None,
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    loss_fn: Callable[..., Loss | Tensor] | None = None,
    data: Dataset[Any] | Data | None = None,
    evaluate: bool = True,
    run_dir: str | Path | None = None,
    sinks: Sequence[Sink] = (),
    seed: int = 0,
    **fit: Any,
) -> TinyFit:
    """Trains a small classifier on made-up data, on this rank; all of it can be replaced.

    Without ``steps`` and ``epochs`` it trains for two epochs of four steps.

    Example::

        def fit():
            return tiny_fit([MyCallback()]).losses

        one, two = run_ranks(fit, 2)
        assert one == two

    Args:
        callbacks: to try; of this rank only.
        steps: global steps, as ``fit(max_steps=...)``.
        epochs: epochs.
        batch_size: the global batch; None where ``data`` has its own.
        samples: how many of them to make up: 8 features, 2 classes.
        model: makes the model.
        optimizer: from the model; AdamW if None.
        loss_fn: as the Trainer's; cross-entropy and accuracy if None.
        data: to train on instead of what is made up.
        evaluate: evaluate on the training data after each epoch.
        run_dir: as the Trainer's.
        sinks: as the Trainer's; silent if none.
        seed: of everything random.
        **fit: more arguments of ``Trainer.fit``.

    Ranks: all, communicates.
    """
    init(seed=seed)
    if steps is None and epochs is None:
        epochs = 2
    if data is None:
        x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(7))
        data = TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long())
    losses: list[float] = []
    applied: list[bool] = []

    class Record(Callback):
        name = "tiny_fit"

        def on_step_end(self, ctx: Context, step: Step) -> None:
            losses.append(step.loss_mean)
            applied.append(step.applied)

    trainer = Trainer(
        model() if model else nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)),
        optimizer or (lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2)),
        loss_fn or _loss_fn,
        callbacks=[*callbacks, Record()],
        sinks=sinks,
        run_dir=run_dir,
    )
    fit |= {"batch_size": batch_size, "max_steps": steps, "epochs": epochs}
    result = trainer.fit(data, eval_set=data if evaluate else None, **fit)
    weights = {n: t.detach().clone() for n, t in tensors_of_state(trainer.model).items()}
    return TinyFit(result, losses, applied, weights)


def _loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Loss:
    x, y = batch
    logits = model(x)
    hard = y if y.dim() == 1 else y.argmax(-1)  # a callback may have made it soft
    accuracy = (logits.argmax(-1) == hard).float().mean()
    return Loss(F.cross_entropy(logits, y), metrics={"accuracy": accuracy}, outputs=logits)
