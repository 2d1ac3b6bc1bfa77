"""A closer look at a loss function and a dataset, after a run on one rank.

Nothing here can disturb what was compared: it comes after the last step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.data import Data, fetch, tensors_of
from dtrain.distributed import random_state, seed_everything
from dtrain.step import as_loss
from dtrain.trials import records as of
from dtrain.trials.check_compare import Record

# The loss of a batch, with dropout and BatchNorm switched off.
LossOf = Callable[[Any], Any]


def examine(
    model: nn.Module,
    loss_of: LossOf,
    batches: Sequence[tuple[Any, int]],
    data: Data | None,
    found: Record,
    fetched: Callable[[list[int]], Any] | None = None,
    rows: Sequence[list[int]] = (),
    at: Callable[[int], None] = lambda step: None,
) -> None:
    """Records what the loss function does with batches, and the data (if any) with a sample.

    ``batches`` are each step's, as the loss function got it, and its samples; ``rows`` are each
    step's, too, of which ``fetched`` makes a batch. ``at`` has a step be the one under way.
    """
    if data is not None:
        _look_at_data(data, found)
    with torch.no_grad():
        _look_at_draws(loss_of, batches[0][0], found)
        modes = [(module, module.training) for module in model.modules()]
        try:
            # As it trains, too (some losses are another there), unless a forward changes the next.
            for mode in ("eval",) if found.moving_buffers else ("train", "eval"):
                if mode == "eval":
                    model.eval()
                for step, (batch, samples) in enumerate(batches, start=1):
                    at(step - 1)
                    _try_parts(loss_of, batch, samples, f"step {step}", mode, found)
            if fetched is not None and not (found.data_draws or found.data_wanders):
                for step, of_step in enumerate(rows, start=1):
                    at(step - 1)
                    _try_padding(loss_of, fetched, of_step, f"step {step}", found)
        except Exception as error:  # noqa: BLE001 -- a user's function, called as never before
            found.failures.append(f"the loss of parts of a batch ({type(error).__name__}: {error})")
        finally:
            for module, training in modes:
                module.training = training


def _try_parts(
    loss_of: LossOf, batch: Any, samples: int, where: str, mode: str, found: Record
) -> None:
    """Is the loss of a batch the weighted mean of its parts'? Keeps what is farthest from it."""

    def loss(start: int, stop: int) -> tuple[float, float]:
        # Copies: some loss functions write into their batch.
        whole = stop - start == samples
        part = of.copy(batch) if whole else of.copy(of.part(batch, samples, start, stop))
        return _mean_and_weight(loss_of, part, stop - start)

    for gap, words in _gaps(loss, samples, where):
        if found.mean_gap is None or gap > found.mean_gap:
            found.mean_gap = gap
            found.mean_evidence = (
                f"{words} So the loss is no mean over its weight. (In {mode} mode, without "
                "dropout.)"
            )


def _try_padding(
    loss_of: LossOf,
    fetched: Callable[[list[int]], Any],
    rows: list[int],
    where: str,
    found: Record,
) -> None:
    """Is it so where each part is collated by itself, and comes in other shapes?"""
    shapes: set[tuple[torch.Size, ...]] = set()

    def loss(start: int, stop: int) -> tuple[float, float]:
        batch = fetched(rows[start:stop])
        shapes.add(tuple(tensor.shape[1:] for tensor in tensors_of(batch)))
        return _mean_and_weight(loss_of, batch, stop - start)

    for gap, words in _gaps(loss, len(rows), where):
        if len(shapes) > 1 and (found.padding_gap is None or gap > found.padding_gap):
            found.padding_gap, found.padding_evidence = gap, words


def _mean_and_weight(loss_of: LossOf, batch: Any, samples: int) -> tuple[float, float]:
    seed_everything(0)
    one = as_loss(loss_of(batch), samples)
    return float(one.mean), float(samples if one.weight is None else one.weight)


def _gaps(
    loss: Callable[[int, int], tuple[float, float]], samples: int, where: str
) -> Iterator[tuple[float, str]]:
    """Yields how far the loss of all samples is from the mean of two parts', and that in words."""
    whole, _ = loss(0, samples)
    # Halves may happen to weigh alike, so uneven parts are tried as well.
    for cut in sorted({samples // 2, 1} & set(range(1, samples))):
        a, b = loss(0, cut), loss(cut, samples)
        weight = a[1] + b[1]
        if not weight:
            continue
        # What weighs nothing counts for nothing, even if its mean is NaN.
        mean = sum(mean * weight for mean, weight in (a, b) if weight) / weight
        apart = abs(mean - whole)
        yield (
            0.0 if not apart else apart / abs(whole) if whole else math.inf,
            f"The loss of the {samples} samples of {where} is {whole:.6g}. Of the same samples in "
            f"two parts ({cut} and {samples - cut}), the mean weighted as the loss function says "
            f"({a[1]:g} and {b[1]:g}) is {mean:.6g}.",
        )


def _look_at_draws(loss_of: LossOf, batch: Any, found: Record) -> None:
    """Which random numbers does the loss function draw?"""
    draws = _Draws()
    before = _streams()
    try:
        with draws:
            loss_of(of.copy(batch))
    except Exception as error:  # noqa: BLE001 -- some code cannot be watched; then it is not
        found.failures.append(f"what the loss draws ({type(error).__name__}: {error})")
    words = sorted(draws.names) + ["(with a generator of its own)"] * draws.own_generator
    for name, state in _streams().items():
        # torch's streams tell only what no operation has told.
        if state != before[name] and (name in ("python", "numpy") or not draws.names):
            words.append(f"from {name}'s global stream")
    found.draws = " ".join(words)


def _streams() -> dict[str, object]:
    state = random_state()
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
        name = func.overloadpacket.__name__
        # Attention is marked as drawing, for its dropout, which is switched off here.
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in name:
            self.names.add(f"torch.{name}")
            self.own_generator |= kwargs.get("generator") is not None
        return func(*args, **kwargs)


def _look_at_data(data: Data, found: Record) -> None:
    """Is a sample the same whenever it is fetched?"""
    rows = list(range(min(4, len(data.dataset))))

    def fetched(seed: int) -> list[str]:
        seed_everything(seed)
        return of.digests(fetch(data.dataset, rows, data.collate_fn), len(rows))

    try:
        first = fetched(1)
        found.data_wanders = fetched(1) != first
        found.data_draws = not found.data_wanders and fetched(2) != first
    except Exception as error:  # noqa: BLE001 -- a user's data; what it gave in training counts
        found.failures.append(f"fetching samples again ({type(error).__name__}: {error})")
