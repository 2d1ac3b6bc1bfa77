"""What is done to a disk when a checkpoint is written, and how its troubles are told."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save as to_bytes
from torch import Tensor

from dtrain.distributed import raw_bytes
from dtrain.errors import CheckpointError

#: What a file raises that was read and holds something else than was written.
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
#: In pieces of so many bytes a file is written, several at once, and each has its checksum. What is
#: hashed or written at once must be large: after it a thread asks for the interpreter's lock, and
#: takes it away from the training.
PIECE_BYTES = 16 * 2**20
#: So many at once, where there are as many cores.
THREADS = min(4, len(os.sched_getaffinity(0)))
#: What goes to the system in one call: for more, it looks for larger pages, which it may not have.
_WRITE_BYTES = 2**20
_LARGEST_HEADER = 100_000_000  # which safetensors reads

T = TypeVar("T")


def write(file: Path, parts: Iterable[memoryview]) -> dict[str, Any]:
    """Writes a file, down to the disk; returns what a manifest says of it. Nothing is copied."""
    pieces = _cut(parts, PIECE_BYTES)
    with file.open("wb"):
        pass  # there, and empty
    # Systems let one thread at a time write to a file, and others spin, which takes a core.
    turn = threading.Lock()
    digests = at_once(
        [partial(_write_piece, file, n * PIECE_BYTES, one, turn) for n, one in enumerate(pieces)]
    )
    sync(file)
    size = sum(len(part) for piece in pieces for part in piece)
    if len(pieces) == 1:
        return {"bytes": size, "sha256": joint(digests)}
    return {"bytes": size, "sha256": joint(digests), "piece": PIECE_BYTES}


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes a safetensors file as :func:`write` does. They are contiguous, and on the CPU."""
    names = order(tensors)
    parts = [raw_bytes(tensors[n]).numpy().data for n in names]
    return write(file, [memoryview(header(tensors, names)), *parts])


def write_bytes(file: Path, content: bytes) -> dict[str, Any]:
    """Writes a file as :func:`write` does."""
    return write(file, [memoryview(content)])


def _cut(parts: Iterable[memoryview], most: int) -> list[list[memoryview]]:
    pieces: list[list[memoryview]] = [[]]
    room = most
    for part in parts:
        left = part
        while left:
            if not room:
                pieces.append([])
                room = most
            pieces[-1].append(left[:room])
            room, left = room - len(pieces[-1][-1]), left[room:]
    return pieces


def _write_piece(file: Path, at: int, piece: Sequence[memoryview], turn: threading.Lock) -> bytes:
    checksum = hashlib.sha256()
    for part in piece:
        checksum.update(part)
    with turn, file.open("r+b", buffering=0) as handle:
        handle.seek(at)
        for part in piece:
            left = part
            while left:  # a disk may take less than it is given, before it says why
                left = left[handle.write(left[:_WRITE_BYTES]) :]
    return checksum.digest()


def at_once(jobs: Sequence[Callable[[], T]], threads: int = THREADS) -> list[T]:
    """Returns what ``jobs`` return, which a few threads do. Where one fails, no other is begun."""
    if min(threads, len(jobs)) < 2:
        return [job() for job in jobs]
    done: dict[int, T] = {}
    errors: list[BaseException] = []
    left, taking = iter(enumerate(jobs)), threading.Lock()

    def work() -> None:
        while not errors:
            with taking:
                number, job = next(left, (-1, None))
            if job is None:
                return
            try:
                done[number] = job()
            except BaseException as error:  # noqa: BLE001 -- it is raised below
                errors.append(error)

    # Daemons: a disk that is stuck must not keep the process (`end_with` sees to that).
    workers = [
        threading.Thread(target=work, name=f"{threading.current_thread().name} {n}", daemon=True)
        for n in range(min(threads, len(jobs)))
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except BaseException as error:  # a second Ctrl-C
        errors.append(error)
        raise
    if errors:
        raise errors[0]
    return [done[number] for number in range(len(jobs))]


def order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of tensors as they lie in a file: at multiples of their dtypes' sizes."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def header(tensors: Mapping[str, Tensor], names: Sequence[str]) -> bytes:
    """Returns what a safetensors file begins with that holds tensors in this order."""
    told, at = {}, 0
    for name in names:
        tensor, begin = tensors[name], at
        at += tensor.nbytes
        told[name] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [begin, at],
        }
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER:
        raise CheckpointError(f"{len(names)} tensors are too many for one safetensors file")
    return len(text).to_bytes(8, "little") + text


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


def digest(file: Path, piece: int = 0) -> str:
    """Returns the sha256 of a file's content; of its pieces' sha256, where it has several."""
    size = file.stat().st_size
    if not piece or size <= piece:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    return joint(at_once([partial(digest_piece, file, at, piece) for at in range(0, size, piece)]))


def digest_piece(file: Path, at: int, piece: int) -> bytes:
    """Returns the sha256 of so many bytes of a file."""
    checksum, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    with file.open("rb", buffering=0) as handle:
        handle.seek(at)
        while piece and (count := handle.readinto(buffer[:piece])):
            checksum.update(buffer[:count])
            piece -= count
    return checksum.digest()


def joint(digests: Sequence[bytes]) -> str:
    """Returns a file's checksum, by those of its pieces, of which it may have one."""
    if len(digests) == 1:
        return digests[0].hex()
    return hashlib.sha256(b"".join(digests)).hexdigest()


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """Returns what safetensors calls a dtype; nothing for one that no such file can hold."""
    try:
        content = to_bytes({"one": torch.empty(0, dtype=dtype)})
    except KeyError:  # what safetensors says of a dtype that it does not know
        return ""
    return str(json.loads(content[8:])["one"]["dtype"])


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
