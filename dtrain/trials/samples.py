"""Samples within batches: which came, and batches of a few of them."""

import hashlib
from typing import Any

from accelerate.utils.operations import recursively_apply

from dtrain.data import tensors_of
from dtrain.distributed import derive_seed, random_state_kept, seed_everything
from dtrain.trials.records import bytes_of


def digests(batch: Any, samples: int) -> list[str]:
    """Returns a digest of each sample in a batch, in order.

    Tensors that are not as long as there are samples belong to no sample, and are left out.
    """
    hashes = [hashlib.sha256() for _ in range(samples)]
    for tensor in tensors_of(batch):
        if tensor.dim() and len(tensor) == samples:
            for one, row in zip(hashes, tensor.detach().cpu(), strict=True):
                one.update(bytes_of(row))
    return [one.hexdigest()[:16] for one in hashes]


def widen(batch: Any) -> Any:
    """Returns the batch with its floating tensors in float64."""
    return recursively_apply(lambda t: t.double() if t.is_floating_point() else t, batch)


def copy(batch: Any) -> Any:
    """Returns the batch with copies of its tensors."""
    return recursively_apply(lambda t: t.detach().clone(), batch)


def part(batch: Any, samples: int, start: int, stop: int) -> Any:
    """Returns a batch of samples ``start`` to ``stop - 1``; a ValueError if it does not divide."""
    if {len(tensor) if tensor.dim() else None for tensor in tensors_of(batch)} != {samples}:
        raise ValueError("its tensors are not all as long as it has samples")
    return recursively_apply(lambda t: t[start:stop], batch)


class SeededByIndex:
    """A dataset whose samples are each drawn from random streams of their own.

    So random augmentation is the same wherever, and with whichever others, a sample is fetched.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        with random_state_kept():
            seed_everything(derive_seed(self._seed, int(index)))
            return self._dataset[index]
