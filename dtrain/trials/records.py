"""What ranks leave in a folder for whoever started them: events, one a line, and tensors."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class EventLog:
    """Writes one rank's events to a launch's folder.

    A line is with the kernel once it is written, so a rank that is killed keeps all it had told.

    Ranks: all, local.
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
    """Writes tensors to a file that :func:`open_tensors` opens."""
    dense = {
        key: tensor.detach().to_dense().cpu().contiguous().clone()
        for key, tensor in tensors.items()
    }
    save_file(dense, folder / f"{name}.safetensors")


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Reads what :func:`write_tensors` wrote."""
    return load_file(folder / f"{name}.safetensors")


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns a digest of names and bits."""
    whole = hashlib.sha256()
    for name, tensor in tensors.items():
        whole.update(name.encode())
        whole.update(bytes_of(tensor))
    return whole.hexdigest()[:16]


def bytes_of(tensor: Tensor) -> bytes:
    """Returns a tensor's bits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
