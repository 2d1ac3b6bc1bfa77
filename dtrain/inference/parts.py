"""Predictions in files: parts that follow one another, in a folder that is there once all are."""

import io
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.checkpoint import discard, sync, write
from dtrain.context import Context
from dtrain.distributed import World
from dtrain.errors import ConfigError, LossError

_PART_BYTES, _PART_SAMPLES = 64 * 2**20, 2**16
_UNFINISHED = ".unfinished"
_ATOMS = (Tensor, bool, int, float, complex, str, bytes, type(None))


class Parts:
    """Writes a rank's predictions. ``torch.load`` reads a part, a list, and runs no code for it.

    Ranks: all, local where a method does not say so.
    """

    def __init__(self, to: str | Path, world: World, context: Context) -> None:
        self._folder = Path(to).expanduser().absolute()
        self._world, self._context = world, context
        self._written: list[tuple[str, int]] = []  # names, and of how many samples
        self._waiting: list[Any] = []
        self._bytes = 0
        self._at = self._folder  # where they are written; known once it is open

    def open(self) -> None:
        """Makes the place to write to. Ranks: all, communicates."""
        path, left = self._world.comm.on_main("predict: folder", self._make)
        self._at = Path(path)
        if not self._at.is_dir():
            raise ConfigError(
                f"predict(to={str(self._folder)!r}): this rank, on {self._world.host}, does not "
                "see the folder that rank 0 has made there: it must be one that all ranks share"
            )
        if left:
            self._context.say(f"removed what unfinished calls of predict had left: {left}")

    def _make(self) -> tuple[str, str]:
        folder, before = self._folder, f".{self._folder.name}."
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ConfigError(
                f"predict(to={str(folder)!r}): it is there already, and nothing is overwritten: "
                "choose another folder, or remove it"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        names = (one.name for one in folder.parent.iterdir())
        left = [name for name in names if name.startswith(before) and name.endswith(_UNFINISHED)]
        for name in left:
            discard(folder.parent / name)
        at = folder.parent / f"{before}{secrets.token_hex(4)}{_UNFINISHED}"
        at.mkdir()
        return str(at), ", ".join(left)

    def add(self, samples: list[Any]) -> None:
        """Takes the next samples' predictions; writes a part when there are enough."""
        for sample in samples:
            self._waiting.append(self._plain(sample))
        if self._bytes >= _PART_BYTES or len(self._waiting) >= _PART_SAMPLES:
            self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        name = f"part-{self._world.rank:05d}-{len(self._written):06d}.pt"
        file = io.BytesIO()
        torch.save(self._waiting, file)
        self._written.append((name, len(self._waiting)))
        self._waiting, self._bytes = [], 0
        try:
            write(self._at / name, [file.getbuffer()])
        except OSError as error:
            error.add_note(
                f"({self._at / name}, a part of predict(to={str(self._folder)!r}), could not be "
                "written; what was is removed. With room for all of them, call it again)"
            )
            raise

    def close(self) -> tuple[list[Path], int]:
        """Returns all ranks' parts, in order, and of how many samples. Ranks: all, communicates."""
        self._write()
        comm = self._world.comm
        parts = [
            one for each in comm.gather_objects("predict: parts", self._written) for one in each
        ]
        comm.on_main("predict: finish", lambda: self._finish([name for name, _ in parts]))
        return [self._folder / name for name, _ in parts], sum(count for _, count in parts)

    def _finish(self, names: list[str]) -> None:
        if gone := [name for name in names if not (self._at / name).is_file()]:
            raise ConfigError(
                f"predict(to={str(self._folder)!r}): {gone[0]} is gone, as if another run wrote to "
                "the same folder: give each its own"
            )
        sync(self._at)
        self._at.rename(self._folder)
        sync(self._folder.parent)

    def drop(self) -> None:
        """Removes what was written, as after a failure: rank 0 all of it, others their own."""
        if self._at == self._folder:
            return
        if self._world.is_main:
            discard(self._at)
        for name, _ in self._written:
            discard(self._at / name)

    def _plain(self, value: Any) -> Any:
        """Returns it as what is read again without running code; arrays of numbers as tensors."""
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value) if value.dtype.kind in "biufc" else value.tolist()
        if isinstance(value, _ATOMS):
            self._bytes += value.nbytes if isinstance(value, Tensor) else 16
            self._bytes += len(value) if isinstance(value, str | bytes) else 0
            return value
        if isinstance(value, Mapping):
            return {key: self._plain(one) for key, one in value.items()}
        if isinstance(value, list):
            return [*map(self._plain, value)]
        if isinstance(value, tuple):
            return tuple(map(self._plain, value))
        raise LossError(
            f"predict(to=...): a prediction holds {type(value).__name__}, and files hold tensors, "
            "arrays, numbers and texts, and lists, tuples and dicts of them"
        )
