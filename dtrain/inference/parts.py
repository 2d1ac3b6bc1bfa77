"""Predictions in files: parts that follow one another, in a folder that is there once all are.

A part is a safetensors file: of each batch its samples and outputs, as JSON in a tensor of bytes,
and the tensors in them. `predictions.json` lists the parts. Nothing is unpickled.
"""

import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.checkpoint import (
    discard,
    dtype_name,
    join,
    read_tensors,
    split,
    sync,
    write_bytes,
    write_tensors,
)
from dtrain.context import Context
from dtrain.distributed import World, raw_bytes
from dtrain.errors import CheckpointError, ConfigError, DataError, LossError
from dtrain.metrics import Batch, listed

_PART_BYTES, _PART_SAMPLES = 64 * 2**20, 2**16
_UNFINISHED, _LIST, _PLAIN, _NUMPY = ".unfinished", "predictions.json", "plain", "__numpy__"


class Parts:
    """Writes a rank's predictions. Ranks: all, local where a method does not say so."""

    def __init__(self, to: str | Path, world: World, context: Context) -> None:
        self.folder = Path(to).expanduser().absolute()
        self._world, self._context = world, context
        self._written: list[dict[str, Any]] = []  # what the list says of them
        self._waiting: list[tuple[int, Any]] = []  # samples and outputs of batches
        self._bytes = 0
        self._at = self.folder  # where they are written; known once it is open

    def open(self) -> None:
        """Makes the place to write to. Ranks: all, communicates."""
        path, left = self._world.comm.on_main("predict: folder", self._make)
        self._at = Path(path)
        if not self._at.is_dir():
            raise ConfigError(
                f"predict(to={str(self.folder)!r}): this rank, on {self._world.host}, does not see "
                "the folder that rank 0 has made there: it must be one that all ranks share"
            )
        if left:
            self._context.say(f"removed what unfinished calls of predict had left: {left}")

    def _make(self) -> tuple[str, str]:
        folder, before = self.folder, f".{self.folder.name}."
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

    def add(self, outputs: Any, samples: int) -> None:
        """Takes a batch's outputs, which are its own; writes a part when there are enough."""
        self._waiting.append((samples, self._plain(outputs)))
        if self._bytes >= _PART_BYTES or sum(n for n, _ in self._waiting) >= _PART_SAMPLES:
            self._write()

    def _plain(self, value: Any) -> Any:
        """Returns what files can hold, as it will be told apart again."""
        if isinstance(value, Tensor):
            if not dtype_name(value.dtype) or value.layout != torch.strided:
                kind = f"{value.dtype}, {value.layout}"
                raise LossError(f"predict(to=...): files cannot hold a tensor that is {kind}")
            self._bytes += value.nbytes
            plain = value.resolve_conj().resolve_neg()
            return raw_bytes(plain).view(plain.dtype).view(plain.shape)
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biufc":
                return self._plain(value.tolist())
            return {_NUMPY: self._plain(torch.from_numpy(value))}
        self._bytes += 16 + (len(value) if isinstance(value, str) else 0)
        if isinstance(value, Mapping):
            return {key: self._plain(one) for key, one in value.items()}
        if isinstance(value, list):
            return [*map(self._plain, value)]
        return tuple(map(self._plain, value)) if isinstance(value, tuple) else value

    def _write(self) -> None:
        if not self._waiting:
            return
        name = f"part-{self._world.rank:05d}-{len(self._written):06d}.safetensors"
        samples = sum(count for count, _ in self._waiting)
        try:
            plain, tensors = split(self._waiting)
        except CheckpointError as error:
            words = str(error).replace("a checkpoint holds", "files hold arrays,")
            raise LossError(f"predict(to=...): of the outputs, {words}") from None
        self._waiting, self._bytes = [], 0
        tensors[_PLAIN] = torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8)
        try:
            told = write_tensors(self._at / name, tensors)
        except OSError as error:
            error.add_note(
                f"({self._at / name}, a part of predict(to={str(self.folder)!r}), could not be "
                "written; what was is removed. With room for all of them, call it again)"
            )
            raise
        self._written.append({"name": name, "samples": samples, "bytes": told["bytes"]})

    def close(self, expected: int | None) -> int:
        """Puts the folder in its place, if it holds as many samples as expected.

        Returns how many it holds. Ranks: all, communicates.
        """
        self._write()
        everyones = self._world.comm.gather_objects("predict: parts", self._written)
        parts = [one for each in everyones for one in each]
        found: int = sum(one["samples"] for one in parts)
        if expected in (None, found):
            self._world.comm.on_main("predict: finish", lambda: self._place(parts))
        return found

    def _place(self, parts: list[dict[str, Any]]) -> None:
        if gone := [one["name"] for one in parts if not (self._at / one["name"]).is_file()]:
            raise ConfigError(
                f"predict(to={str(self.folder)!r}): {gone[0]} is gone, as if another run wrote to "
                "the same folder: give each its own"
            )
        write_bytes(self._at / _LIST, json.dumps({"format": 1, "parts": parts}).encode())
        sync(self._at)
        self._at.rename(self.folder)
        sync(self.folder.parent)

    def drop(self) -> None:
        """Removes what this rank has written, so that there is room: others may still write."""
        if self._at != self.folder:
            for file in self._at.glob(f"part-{self._world.rank:05d}-*"):
                discard(file)

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Removes what is left of a failure, of which all ranks know by now."""
        if kind and self._world.is_main and self._at != self.folder:
            discard(self._at)


def load_predictions(folder: str | Path) -> Iterator[Any]:
    """Yields the output of each sample, in order, that ``predict(to=folder)`` wrote.

    One part is in memory at a time.

    Example::

        scores = torch.stack([one["score"] for one in dtrain.load_predictions("out")])

    Raises:
        DataError: no whole predictions are there.

    Ranks: this one, local.
    """
    path = Path(folder).expanduser()
    if not (path / _LIST).is_file():
        raise DataError(
            f"{path} holds no predictions: predict(to=...) makes such a folder, once all are there"
        )
    parts = json.loads((path / _LIST).read_text(encoding="utf-8"))["parts"]
    for one in parts:
        file = path / one["name"]
        there = file.stat().st_size if file.is_file() else None
        if there != one["bytes"]:
            found = "is missing" if there is None else f"has {there} bytes, not {one['bytes']}"
            raise DataError(f"{file} {found}: the predictions are not whole; make them again")
    return _samples(path, parts)


def _samples(path: Path, parts: list[dict[str, Any]]) -> Iterator[Any]:
    for one in parts:
        tensors = read_tensors(path / one["name"])
        plain = json.loads(tensors[_PLAIN].numpy().tobytes())
        for samples, outputs in join(plain, tensors):
            yield from listed([Batch(_restored(outputs), samples, None)])


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        if {*value} == {_NUMPY}:
            return value[_NUMPY].numpy()
        return {key: _restored(one) for key, one in value.items()}
    if isinstance(value, list):
        return [*map(_restored, value)]
    return tuple(map(_restored, value)) if isinstance(value, tuple) else value
