"""Tensors that lie in a safetensors file, of which is read what is asked for.

Not by mapping the file into memory, where what was read stays with the process.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn

from dtrain.checkpoint import disk
from dtrain.distributed import fill_own_part, is_sharded, tensors_of_state
from dtrain.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file."""

    file: Path
    begin: int  # of its bytes
    shape: torch.Size
    dtype: torch.dtype

    def whole(self) -> Tensor:
        """Returns it, on the CPU."""
        return self.part(())

    def part(self, at: tuple[slice, ...]) -> Tensor:
        """Returns a part of it; no other rows are read, but columns are."""
        first, *inner = at or (slice(None),)
        if not self.shape:
            return self._read(0, 1).view(())
        row = self.shape[1:].numel()
        begin, end, _ = first.indices(self.shape[0])
        rows = self._read(begin * row, end * row).view(max(end - begin, 0), *self.shape[1:])
        return rows[(slice(None), *inner)]

    def _read(self, begin: int, end: int) -> Tensor:
        """Returns numbers of it, flat: from the ``begin``-th on, before the ``end``-th."""
        read = torch.empty(max(end - begin, 0), dtype=self.dtype)
        left = read.view(torch.uint8).numpy().data if read.numel() else memoryview(b"")
        with disk.plain_words(self.file, "cannot be read"), self.file.open("rb", 0) as handle:
            handle.seek(self.begin + begin * self.dtype.itemsize)
            while left:
                if not (count := handle.readinto(left)):
                    raise CheckpointError(f"{self.file} is shorter than it says")
                left = left[count:]
        return read


def stored_in(file: Path) -> dict[str, Stored]:
    """Returns the tensors of a safetensors file, by name."""
    with disk.plain_words(file, "cannot be read", CheckpointError, *disk.DAMAGE):
        with file.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            told = json.loads(handle.read(size))
        return {
            name: Stored(
                file,
                8 + size + one["data_offsets"][0],
                torch.Size(one["shape"]),
                _dtype_of(one["dtype"]),
            )
            for name, one in told.items()
            if name != "__metadata__"
        }


@torch.no_grad()
def fill_shards(model: nn.Module, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Reads into a model's sharded tensors this rank's part of each; returns those, by name."""
    filled = {}
    for name, tensor in tensors_of_state(model).items():
        if is_sharded(tensor) and name in stored and stored[name].shape == tensor.shape:
            fill_own_part(tensor, stored[name].part)
            filled[name] = tensor
    return filled


@cache
def _dtype_of(name: str) -> torch.dtype:
    """Returns the dtype that safetensors calls so."""
    told = json.dumps({"one": {"dtype": name, "shape": [0], "data_offsets": [0, 0]}}).encode()
    return load(len(told).to_bytes(8, "little") + told)["one"].dtype
