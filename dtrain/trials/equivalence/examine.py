"""A closer look at a loss function and a dataset, after a run on one rank.

Nothing here can disturb what was compared: it comes after the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.context import Loss
from dtrain.data import Data, fetch
from dtrain.distributed import random_streams, seed_everything
from dtrain.step import as_loss
from dtrain.trials.equivalence import samples as of
from dtrain.trials.equivalence.record import Examined

LossOf = Callable[[Any], Any]


def examine(
    model: nn.Module,
    loss_of: LossOf,
    batches: Sequence[tuple[Any, int]],
    data: Data | None,
    *,
    keeps_state: bool,
) -> Examined:
    """Returns what the loss function does with batches, and the data with a sample.

    Args:
        model: the trained one; left in the modes it was in.
        loss_of: the loss function, from a batch, with dropout and BatchNorm switched off.
        batches: the global batch of each step, as the loss function got it, and its samples.
        data: what was trained on, if it has samples to fetch.
        keeps_state: in training, a forward changes what the next one gives.

    Ranks: one; local.
    """
    found = Examined()
    if data is not None:
        _look_at_data(data, found)
    with torch.no_grad():
        _look_at_draws(loss_of, batches[0][0], found)
        modes = [(module, module.training) for module in model.modules()]
        try:
            # As it trains, too: some losses are another there.
            if not keeps_state:
                _try_batches(loss_of, batches, "train", found)
            model.eval()
            _try_batches(loss_of, batches, "eval", found)
        except Exception as error:  # noqa: BLE001 -- a user's function, called as never before
            found.failures.append(f"the loss of parts of a batch ({type(error).__name__}: {error})")
        finally:
            for module, training in modes:
                module.training = training
    return found


def _try_batches(
    loss_of: LossOf, batches: Sequence[tuple[Any, int]], mode: str, found: Examined
) -> None:
    for step, (batch, samples) in enumerate(batches):
        if _try_parts(loss_of, batch, samples, found):
            found.step, found.mode = step, mode


def _try_parts(loss_of: LossOf, batch: Any, samples: int, found: Examined) -> bool:
    """Is the loss of a batch the weighted mean of its parts'? Says if it is farther than before."""
    farther = False
    whole, _ = _loss(loss_of, batch, samples)
    # Halves may happen to weigh alike, so uneven parts are tried as well.
    for cut in sorted({samples // 2, 1} & set(range(1, samples))):
        pieces = [
            _loss(loss_of, of.part(batch, samples, start, stop), stop - start)
            for start, stop in ((0, cut), (cut, samples))
        ]
        weights = [weight for _, weight in pieces]
        if not sum(weights):
            continue
        # What weighs nothing counts for nothing, even if its mean is NaN.
        mean = sum(m * w for m, w in pieces if w) / sum(weights)
        if not found.tried_parts or abs(mean - whole) > abs(found.parts - found.whole):
            found.whole, found.parts = whole, mean
            found.sizes, found.weights = [cut, samples - cut], weights
            found.tried_parts = farther = True
    return farther


def _loss(loss_of: LossOf, batch: Any, samples: int) -> tuple[float, float]:
    seed_everything(0)
    # A copy: some loss functions write into their batch.
    loss: Loss = as_loss(loss_of(of.copy(batch)), samples)
    weight = samples if loss.weight is None else loss.weight
    return float(loss.mean), float(weight)


def _look_at_draws(loss_of: LossOf, batch: Any, found: Examined) -> None:
    """Which random numbers does the loss function draw?"""
    draws = _Draws()
    before = _streams()
    try:
        with draws:
            loss_of(of.copy(batch))
    except Exception as error:  # noqa: BLE001 -- some code cannot be watched; then it is not
        found.failures.append(f"what the loss draws ({type(error).__name__}: {error})")
    after = _streams()
    found.streams = [name for name in before if before[name] != after[name]]
    found.draws = sorted(draws.names)
    found.own_generator = draws.own_generator


def _streams() -> dict[str, object]:
    state = random_streams.capture()
    return {name: str(v.tolist()) if name in ("torch", "cuda") else v for name, v in state.items()}


class _Draws(TorchDispatchMode):
    """Notes each of torch's operations that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self.own_generator = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and not _is_attention(func):
            self.names.add(f"torch.{func.overloadpacket.__name__}")
            self.own_generator |= kwargs.get("generator") is not None
        return func(*args, **kwargs)


def _is_attention(func: Any) -> bool:
    # Marked as drawing, for its dropout, which is switched off here.
    return "attention" in str(func.overloadpacket.__name__)


def _look_at_data(data: Data, found: Examined) -> None:
    """Is a sample the same whenever it is fetched?"""
    length = len(data.dataset)
    rows = list(range(min(4, length)))

    def fetched(seed: int) -> list[str]:
        seed_everything(seed)
        return of.digests(fetch(data.dataset, rows, data.collate_fn), len(rows))

    try:
        first = fetched(1)
        found.data_wanders = fetched(1) != first
        found.data_draws = not found.data_wanders and fetched(2) != first
    except Exception as error:  # noqa: BLE001 -- a user's data; what it gave in training counts
        found.failures.append(f"fetching samples again ({type(error).__name__}: {error})")
