"""What is done to a disk when a checkpoint is written, and how its troubles are told."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from torch import Tensor

from dtrain.errors import CheckpointError

#: What a file raises that was read and holds something else than was written.
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file, down to the disk. The tensors are contiguous, and on the CPU."""
    save_file(tensors, file)
    sync(file)


def write_bytes(file: Path, content: bytes) -> None:
    """Writes a file, down to the disk."""
    file.write_bytes(content)
    sync(file)


def sync(path: Path) -> None:
    """Brings a file down to the disk; or what was made, renamed or deleted in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def delete(path: Path) -> None:
    """Deletes a file or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> str:
    """Deletes as :func:`delete` does, as much as can be; returns why not all, or nothing."""
    try:
        delete(path)
    except OSError as error:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        return f"{path} cannot be deleted: {error}"
    return ""


def overwrite(file: Path, content: bytes) -> None:
    """Writes into a file that is there: where a disk is full, its place is still its own."""
    with file.open("r+b") as handle:
        handle.write(content)
        handle.truncate()
    sync(file)


def digest(file: Path) -> str:
    """Returns the sha256 of a file's content."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@cache
def can_hold(dtype: torch.dtype) -> bool:
    """Says whether a safetensors file can hold tensors of ``dtype``."""
    try:
        to_bytes({"one": torch.empty(0, dtype=dtype)})
    except KeyError:  # what safetensors says of a dtype that it does not know
        return False
    return True


@contextmanager
def plain_words(
    path: Path, what: str = "could not be written", *more: type[Exception]
) -> Iterator[None]:
    """Turns what the disk says (or one of ``more``) into a CheckpointError that names ``path``."""
    kinds: tuple[type[Exception], ...] = (OSError, SafetensorError, *more)
    try:
        yield
    except kinds as error:
        raise CheckpointError(f"{path} {what}: {error}") from error
