"""Checkpoints on disk: written aside, checked, renamed into place; read only if intact.

::

    run_dir/checkpoints/step-00000500/
        model.safetensors        parameters and buffers
        state.safetensors        optimizer and callbacks: what is a tensor
        state.json               optimizer, callbacks, progress: what is not
        rank-00000.safetensors   this rank's random streams
        rank-00000.json
        manifest.json            size and sha256 of each file, written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import ContextDecorator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dtrain.checkpoint import tree
from dtrain.comm import Comm
from dtrain.errors import CheckpointError

FORMAT = 1
MODEL = "model.safetensors"
_MANIFEST = "manifest.json"
_REPLACED = ".replaced-"


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was found intact.

    Attributes:
        path: its folder.
        step: the global step after which it was made.
        metrics: the newest agreed metrics when it was made.
    """

    path: Path
    step: int
    metrics: dict[str, float]


def save(
    folder: Path,
    *,
    step: int,
    model: dict[str, Tensor],
    state: dict[str, Any],
    rank_state: dict[str, Any],
    metrics: dict[str, float],
    rank: int,
    comm: Comm,
) -> Path:
    """Writes a checkpoint; it is there whole, or not at all.

    Args:
        folder: ``run_dir/checkpoints``, on a disk that all ranks share.
        step: the global step.
        model: parameters and buffers; rank 0's are written.
        state: everything else that is equal on all ranks; rank 0's is written.
        rank_state: what is this rank's own.
        metrics: the newest agreed metrics.
        rank: this rank.
        comm: to meet the others.

    Raises:
        CheckpointError: it could not be written; nothing else was touched.

    Ranks: all, communicates.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f".writing-{final.name}"

    # Here, too, so that the others are told which checkpoint it was.
    @_plain_words(final)
    def begin() -> None:
        _tidy(folder)
        aside.mkdir(parents=True)

    @_plain_words(final)
    def commit() -> None:
        _commit(aside, final, step, metrics)

    try:
        with comm.lockstep("saving a checkpoint"), _plain_words(final):
            comm.on_main("checkpoint: begin", begin)
            if rank == 0:
                _write_tensors(aside / MODEL, _copies(model))
                _write_tree(aside / "state", state)
            _write_tree(aside / f"rank-{rank:05d}", rank_state)
            comm.barrier("checkpoint: written")
            comm.on_main("checkpoint: commit", commit)
    except Exception:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)  # it may be the disk that is full
        raise
    return final


def _tidy(folder: Path) -> None:
    """Ends what a kill cut short: half a save goes, what it was about to replace comes back."""
    for replaced in folder.glob(f"{_REPLACED}step-*"):
        final = folder / replaced.name.removeprefix(_REPLACED)
        if final.exists():
            _delete(replaced)
        else:
            replaced.rename(final)
    for leftover in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):
        _delete(leftover)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _commit(aside: Path, final: Path, step: int, metrics: dict[str, float]) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(aside.iterdir())
    }
    manifest = {"format": FORMAT, "step": step, "metrics": metrics, "files": files}
    manifest["sha256"] = _digest_of(manifest)
    _write_bytes(aside / _MANIFEST, json.dumps(manifest, indent=1).encode())
    _sync_folder(aside)
    replaced = final.with_name(_REPLACED + final.name)
    if final.is_dir():  # the same step saved again, after a resume
        final.rename(replaced)  # where it is found, should a kill come before the next line
    aside.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)  # what is left of it goes with the next save


def find(folder: Path) -> tuple[Saved | None, list[str]]:
    """Returns the newest intact checkpoint, and what is wrong with newer ones.

    Ranks: all, local; reads every byte of the files it looks at.
    """
    damage: list[str] = []
    for path in reversed(_by_step(folder)):
        try:
            return check(path), damage
        except CheckpointError as error:
            damage.append(str(error))
    return None, damage


def listed(folder: Path) -> list[Saved]:
    """Returns the checkpoints in ``folder``, oldest first, by their manifests alone."""
    saved = []
    for path in _by_step(folder):
        try:
            manifest = _read_manifest(path)
        except CheckpointError:
            continue  # damaged: `find` says so when it matters
        saved.append(Saved(path, manifest["step"], manifest["metrics"]))
    return saved


def load_model(path: Path) -> dict[str, Tensor]:
    """Returns parameters and buffers, on the CPU.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return load_tensors(path / MODEL)


def load_state(path: Path) -> dict[str, Any]:
    """Returns what was saved as ``state``.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return _read_tree(path / "state")


def load_rank_state(path: Path, rank: int) -> dict[str, Any] | None:
    """Returns what this rank saved, or None where the run had fewer ranks.

    Raises:
        CheckpointError: a file cannot be read.
    """
    base = path / f"rank-{rank:05d}"
    return _read_tree(base) if base.with_suffix(".json").exists() else None


def remove(folder: Path, step: int) -> None:
    """Deletes the checkpoint of ``step``; renamed first, so that half of one is never found.

    Ranks: rank 0 only.
    """
    path = folder / f"step-{step:08d}"
    aside = folder / f".removing-{path.name}"
    if aside.exists():  # killed while it removed, and the step was saved again
        shutil.rmtree(aside)
    path.rename(aside)
    shutil.rmtree(aside)


def _by_step(folder: Path) -> list[Path]:
    paths = {path.name: path for path in folder.glob("step-*")}
    for path in folder.glob(f"{_REPLACED}step-*"):  # killed before the new one was in its place
        paths.setdefault(path.name.removeprefix(_REPLACED), path)
    numbered = [name for name in paths if name[5:].isdecimal()]
    return [paths[name] for name in sorted(numbered, key=lambda name: int(name[5:]))]


def _digest_of(manifest: dict[str, Any]) -> str:
    """Returns the digest of a manifest's own content, but for the digest itself."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(value: object) -> str:
    """Returns a short digest of JSON values, to compare them between ranks and runs."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def has_manifest(path: Path) -> bool:
    """Says whether a folder is a checkpoint's."""
    return (path / _MANIFEST).exists()


def check(path: Path) -> Saved:
    """Compares all files of one checkpoint with its manifest.

    Raises:
        CheckpointError: names the first file that is not as it was written.

    Ranks: all, local; reads every byte.
    """
    manifest = _read_manifest(path)
    for name, facts in manifest["files"].items():
        file = path / name
        try:
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            if (size := file.stat().st_size) != facts["bytes"]:
                raise CheckpointError(f"{file} has {size} bytes, not the {facts['bytes']} written")
            changed = _digest(file) != facts["sha256"]
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if changed:
            raise CheckpointError(f"{file} was changed since it was written (its sha256 differs)")
    return Saved(path, manifest["step"], manifest["metrics"])


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / _MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{file} has format {manifest['format']}; this dtrain reads {FORMAT}"
            )
        if manifest["sha256"] != _digest_of(manifest):
            raise ValueError("it was changed since it was written")
        facts = [(f["bytes"], f["sha256"]) for f in manifest["files"].values()]
        if not isinstance(manifest["step"], int) or not facts:
            raise ValueError("step or files")
        if any("/" in name or name.startswith(".") for name in manifest["files"]):
            raise ValueError("a file outside of its folder")
        named = path.name.rpartition("step-")[2]
        if named.isdecimal() and int(named) != manifest["step"]:
            raise ValueError(f"it is of step {manifest['step']}, not of its folder's")
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: the checkpoint is not complete") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from error
    return dict(manifest)


def _write_tree(base: Path, state: dict[str, Any]) -> None:
    plain, tensors = tree.split(state)
    _write_tensors(base.with_suffix(".safetensors"), tensors)
    _write_bytes(base.with_suffix(".json"), json.dumps(plain).encode())


def _read_tree(base: Path) -> dict[str, Any]:
    file = base.with_suffix(".json")
    tensors = load_tensors(base.with_suffix(".safetensors"))
    try:
        state = tree.join(json.loads(file.read_bytes()), tensors)
        if not isinstance(state, dict):
            raise TypeError(f"it holds {type(state).__name__}, not dict")
    except (OSError, ValueError, TypeError, LookupError, RecursionError, CheckpointError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    return state


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, file)
    except KeyError as unknown:  # what safetensors says of a dtype that it does not know
        raise CheckpointError(
            f"{file} could not be written: no tensor of dtype {unknown} can be saved"
        ) from unknown
    _sync_file(file)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _write_bytes(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    _sync_file(file)


def _sync_file(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class _plain_words(ContextDecorator):
    """Turns what the disk says into a CheckpointError that names the checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"{self._path} could not be written: {error}") from error
