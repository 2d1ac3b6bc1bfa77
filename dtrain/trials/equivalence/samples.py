"""Samples within batches: which came, and batches of a few of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor

from dtrain.distributed import derive_seed, random_streams, seed_everything


def digests(batch: Any, samples: int) -> list[str]:
    """Returns a digest of each sample in a batch, in order.

    Tensors that are not as long as there are samples belong to no sample, and are left out.
    """
    hashes = [hashlib.sha256() for _ in range(samples)]
    for tensor in _leaves(batch):
        if tensor.dim() and len(tensor) == samples:
            rows = tensor.detach().cpu().contiguous()
            for one, row in zip(hashes, rows, strict=True):
                one.update(row.reshape(-1).view(torch.uint8).numpy().tobytes())
    return [one.hexdigest()[:16] for one in hashes]


def shapes(batch: Any) -> str:
    """Returns the shapes of a sample's tensors, as text."""
    return " ".join(str(list(t.shape[1:])) for t in _leaves(batch))


def widen(batch: Any) -> Any:
    """Returns the batch with its floating tensors in float64."""
    return _mapped(batch, lambda t: t.double() if t.is_floating_point() else t)


def copy(batch: Any) -> Any:
    """Returns the batch with copies of its tensors."""
    return _mapped(batch, lambda t: t.detach().clone())


def part(batch: Any, samples: int, start: int, stop: int) -> Any:
    """Returns a batch of samples ``start`` to ``stop - 1``.

    Raises:
        ValueError: the batch holds something that does not divide by samples.
    """
    tensors = list(_leaves(batch))
    if not tensors or any(not t.dim() or len(t) != samples for t in tensors):
        raise ValueError("its tensors are not all as long as it has samples")
    return _mapped(batch, lambda t: t[start:stop])


class SeededByIndex:
    """A dataset whose samples are each drawn from random streams of their own.

    So that random augmentation is the same wherever, and with whichever others, a sample is
    fetched.

    Args:
        dataset: the user's.
        seed: which streams.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        before = random_streams.capture()
        seed_everything(derive_seed(self._seed, int(index)))
        try:
            return self._dataset[index]
        finally:
            random_streams.restore(before)


def _mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return recursively_apply(change, batch)


def _leaves(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _leaves(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _leaves(value)
