"""What ranks leave in a folder: events, one a line, and tensors; digests and parts of batches."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply
from safetensors.torch import save_file
from torch import Tensor

from dtrain.data import tensors_of
from dtrain.distributed import derive_seed, random_state_kept, raw_bytes, seed_everything


class EventLog:
    """Writes one rank's events to a launch's folder. Ranks: all, local.

    A line is with the kernel once it is written, so a rank that is killed keeps all it had told.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._file = os.open(folder / f"rank-{rank}.jsonl", flags)

    def tell(self, event: str, **values: Any) -> None:
        """Writes one event, in one piece."""
        os.write(self._file, (json.dumps({"event": event, **values}) + "\n").encode())


def events(folder: Path, rank: int) -> list[dict[str, Any]]:
    """Returns what a rank told; nothing if it did not come that far."""
    file = folder / f"rank-{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors of any layout and device to one safetensors file."""
    dense = {key: t.detach().to_dense().cpu().contiguous().clone() for key, t in tensors.items()}
    save_file(dense, folder / f"{name}.safetensors")


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns a digest of names and bits."""
    whole = hashlib.sha256()
    for name, tensor in tensors.items():
        whole.update(name.encode())
        whole.update(_bits(tensor))
    return whole.hexdigest()[:16]


def digests(batch: Any, samples: int) -> list[str]:
    """Returns a digest of each sample in a batch, in order.

    Tensors that are not as long as there are samples belong to no sample, and are left out.
    """
    hashes = [hashlib.sha256() for _ in range(samples)]
    for tensor in tensors_of(batch):
        if tensor.dim() and len(tensor) == samples:
            for one, row in zip(hashes, tensor.detach().cpu(), strict=True):
                one.update(_bits(row))
    return [one.hexdigest()[:16] for one in hashes]


def widen(batch: Any) -> Any:
    """Returns the batch with its floating tensors in float64."""
    return recursively_apply(lambda t: t.double() if t.is_floating_point() else t, batch)


def placed(batch: Any, device: torch.device, *, double: bool) -> Any:
    """Returns the batch on the device; with its floating tensors in float64 if asked for."""
    batch = recursively_apply(lambda t: t.to(device), batch)
    return widen(batch) if double else batch


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
        self.dataset, self._seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with random_state_kept():
            seed_everything(derive_seed(self._seed, int(index)))
            return self.dataset[index]


def _bits(tensor: Tensor) -> bytes:
    return raw_bytes(tensor.detach().cpu()).numpy().tobytes()
