"""Checkpoints on disk: renamed into place once they are whole; read only if intact.

::

    run_dir/checkpoints/step-00000500/
        model.safetensors        parameters and buffers
        state.safetensors        optimizer and callbacks: what is a tensor
        state.json               optimizer, callbacks, progress: what is not
        rank-00000.safetensors   this rank's random streams
        rank-00000.json
        manifest.json            size and sha256 of each file, written last

Of a file that is larger than its ``piece``, the sha256 is that of its pieces' sha256, one after
another, so that several threads can make and check it. (In format 1 it is the file's own.)

What is large comes in parts, as Hugging Face's libraries name and index them::

        model-00001-of-00004.safetensors ... model.safetensors.index.json

Who writes which of them is said in :mod:`dtrain.checkpoint.writer`.

Ranks: all read, rank 0 alone commits, tidies and removes; all local.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dtrain.checkpoint import disk, tree
from dtrain.checkpoint.stored import Stored, stored_in
from dtrain.distributed import plain_name
from dtrain.errors import CheckpointError

FORMAT = 2
MODEL, STATE = "model", "state"
_MANIFEST = "manifest.json"
_REPLACED = ".replaced-"


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was found intact."""

    path: Path  # its folder
    step: int  # the global step after which it was made
    metrics: dict[str, float]  # of these very weights (of older code: the newest agreed ones)


def place(folder: Path, step: int, token: str = "") -> tuple[Path, Path]:
    """Returns where the checkpoint of ``step`` is to be, and where it is written before.

    ``token`` is of the start that writes it, so that no other's file comes between its own.
    """
    final = folder / f"step-{step:08d}"
    return final, folder / f".writing-{final.name}-{token}".rstrip("-")


def part_name(stem: str, number: int, parts: int) -> str:
    """Returns the name of the ``number``-th of so many files, from 0."""
    part = f"-{number + 1:05d}-of-{parts:05d}" if parts > 1 else ""
    return f"{stem}{part}.safetensors"


def rank_name(rank: int) -> str:
    """Returns what the names of a rank's own files begin with."""
    return f"rank-{rank:05d}"


def commit(
    aside: Path,
    final: Path,
    step: int,
    metrics: dict[str, float],
    facts: Mapping[str, Any],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Writes the manifest of a checkpoint that is whole, and renames its folder into place.

    ``facts`` are what :func:`disk.write` said of each file, by name. ``check``, called at the last
    moment, raises where this start may not write any more.
    """
    manifest = {"format": FORMAT, "step": step, "metrics": metrics, "files": dict(facts)}
    manifest["sha256"] = _digest_of(manifest)
    disk.write_bytes(aside / _MANIFEST, json.dumps(manifest, indent=1).encode())
    disk.sync(aside)
    check()
    replaced = final.with_name(_REPLACED + final.name)
    if final.is_dir():  # the same step saved again, after a resume
        final.rename(replaced)  # where it is found, should a kill come before the next line
    aside.rename(final)
    disk.sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)  # what is left of it goes with the next save


def tidy(folder: Path) -> None:
    """Ends what a kill cut short: half a save goes, what it was about to replace comes back."""
    for replaced in folder.glob(f"{_REPLACED}step-*"):
        final = folder / replaced.name.removeprefix(_REPLACED)
        if final.exists():
            _retire(replaced)
        else:
            replaced.rename(final)
    for leftover in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):
        disk.discard(leftover)


def find(folder: Path) -> tuple[Saved | None, list[str]]:
    """Returns the newest intact checkpoint, every byte read, and what is wrong with newer ones."""
    damage: list[str] = []
    for path in newest_first(folder):
        try:
            return check(path), damage
        except CheckpointError as error:
            damage.append(str(error))
    return None, damage


def newest_first(folder: Path) -> list[Path]:
    """Returns the folders of checkpoints, intact or not."""
    return _by_step(folder)[::-1]


def listed(folder: Path) -> list[Saved]:
    """Returns the checkpoints in ``folder``, oldest first, by their manifests alone."""
    saved = []
    for path in _by_step(folder):
        with suppress(CheckpointError):  # damaged: `find` says so when it matters
            manifest = read_manifest(path)
            saved.append(Saved(path, manifest["step"], manifest["metrics"]))
    return saved


def model_file(path: Path) -> Path:
    """Returns the file with the model; the checkpoint's folder, where it is in parts."""
    file = path / part_name(MODEL, 0, 1)
    return file if file.exists() else path


def load_model(path: Path) -> dict[str, Tensor]:
    """Returns parameters and buffers, on the CPU; a CheckpointError names what cannot be read."""
    return {plain_name(name): tensor for name, tensor in _load_parts(path, MODEL).items()}


def stored_model(path: Path) -> dict[str, Stored]:
    """Returns where parameters and buffers lie."""
    return {plain_name(name): one for name, one in _stored_parts(path, MODEL).items()}


def whose_weights(path: Path) -> dict[str, Any]:
    """Returns whose weights count as what in a checkpoint, and by which metric one is the best."""
    known: dict[str, Any] = load_plain(path).get("weights", {})
    return {"whose": {}, "held": {}, "best_by": None} | known


def load_plain(path: Path) -> dict[str, Any]:
    """Returns what was saved as ``state`` but for its tensors, of which there are but names."""
    file = path / f"{STATE}.json"
    with disk.plain_words(file, "cannot be read", CheckpointError, *disk.DAMAGE):
        plain: dict[str, Any] = json.loads(file.read_bytes())
        return plain


def load_held(path: Path, which: str) -> dict[str, Tensor]:
    """Returns the weights that count as ``which``, if these are not the model's own."""
    known = whose_weights(path)
    if which not in known["whose"]:
        return {}
    part = known["held"][known["whose"][which][1]]
    held: dict[str, Tensor] = tree.join(part, _load_parts(path, STATE, only=tree.names_in(part)))
    return held


def best_of(saved: list[Saved], metric: str, mode: str) -> Saved | None:
    """Returns the checkpoint with the best value of a metric, if any has one."""
    sign = 1 if mode == "min" else -1
    scored = [one for one in saved if math.isfinite(one.metrics.get(metric, math.nan))]
    return min(scored, key=lambda one: (sign * one.metrics[metric], one.step), default=None)


def load_state(path: Path, *, optimizer: bool = True) -> dict[str, Any]:
    """Returns what was saved as ``state``; without ``optimizer``, parameters' as ``Stored``."""
    tensors: dict[str, Any]
    if optimizer:
        tensors = dict(_load_parts(path, STATE))
    else:
        there = _stored_parts(path, STATE)
        # What is deeper, such as LBFGS's lists, is of no one parameter; nor is a rate's tensor.
        later = {name for name in there if re.fullmatch(r"optimizer/state/[^/]+/[^/]+", name)}
        tensors = {n: one if n in later else one.whole() for n, one in there.items()}
    return _join(path / f"{STATE}.json", tensors)


def load_rank_state(path: Path, rank: int) -> dict[str, Any] | None:
    """Returns what this rank saved, or None where the run had fewer ranks."""
    file = path / f"{rank_name(rank)}.json"
    return _join(file, load_tensors(file.with_suffix(".safetensors"))) if file.exists() else None


def load_tensors(file: Path, only: set[str] | None = None) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, or only these, on the CPU."""
    with disk.plain_words(file, "cannot be read"):
        if only is None:
            return load_file(file)
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if name in only}  # noqa: SIM118


def remove(folder: Path, step: int) -> str:
    """Deletes the checkpoint of ``step``; returns why not, or why some of it is left."""
    return _retire(place(folder, step)[0])


def _retire(path: Path) -> str:
    """Deletes a checkpoint; renamed first, so that half of one is never found."""
    # What nobody could delete may be left of an earlier one: a file that is open, on NFS.
    name = f".removing-{path.name.lstrip('.')}"
    asides = (path.with_name(f"{name}-{n}" if n else name) for n in count())
    aside = next(one for one in asides if not one.exists())
    try:
        path.rename(aside)
    except OSError as error:
        return f"{path} cannot be deleted: {error}"
    return disk.discard(aside)


def _by_step(folder: Path) -> list[Path]:
    paths = {path.name: path for path in folder.glob("step-*")}
    for path in folder.glob(f"{_REPLACED}step-*"):  # killed before the new one was in its place
        paths.setdefault(path.name.removeprefix(_REPLACED), path)
    numbered = [name for name in paths if name[5:].isdecimal()]
    return [paths[name] for name in sorted(numbered, key=lambda name: int(name[5:]))]


def _digest_of(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def has_manifest(path: Path) -> bool:
    """Says whether a folder is a checkpoint's."""
    return (path / _MANIFEST).exists()


def check(path: Path) -> Saved:
    """Compares each file with the manifest; a CheckpointError names the first that differs."""
    manifest = read_manifest(path)
    for name, facts in manifest["files"].items():
        file = path / name
        with disk.plain_words(file, "cannot be read"):
            check_size(file, facts)
            if trouble := differs(file, disk.digest(file, facts.get("piece", 0)), facts):
                raise CheckpointError(trouble)
    return Saved(path, manifest["step"], manifest["metrics"])


def check_size(file: Path, facts: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a file is not there, or is not as long as it was written."""
    with disk.plain_words(file, "cannot be read"):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if (size := file.stat().st_size) != facts["bytes"]:
            raise CheckpointError(f"{file} has {size} bytes, not the {facts['bytes']} written")


def differs(file: Path, sha256: str, facts: Mapping[str, Any]) -> str:
    """Returns in words that a file holds something else than was written, if so."""
    if sha256 == facts["sha256"]:
        return ""
    return f"{file} was changed since it was written (its sha256 differs)"


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns what a checkpoint's manifest says; a CheckpointError tells why it cannot be read."""
    file = path / _MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        if (found := manifest["format"]) not in (1, FORMAT):
            raise CheckpointError(f"{file} has format {found}; this dtrain reads up to {FORMAT}")
        if manifest["sha256"] != _digest_of(manifest):
            raise ValueError("it was changed since it was written")
        facts = [(f["bytes"], f["sha256"]) for f in manifest["files"].values()]
        pieces = [f.get("piece", 0) for f in manifest["files"].values()]
        if any(not isinstance(piece, int) or piece < 0 for piece in pieces):
            raise ValueError("piece")
        if not isinstance(manifest["step"], int) or not facts:
            raise ValueError("step or files")
        if any("/" in name or name.startswith(".") for name in manifest["files"]):
            raise ValueError("a file outside of its folder")
        named = path.name.rpartition("step-")[2]
        if named.isdecimal() and int(named) != manifest["step"]:
            raise ValueError(f"it is of step {manifest['step']}, not of its folder's")
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: the checkpoint is not complete") from None
    except (OSError, *disk.DAMAGE) as error:
        raise CheckpointError(f"{file} cannot be read: {error!r}") from error
    return dict(manifest)


def _load_parts(path: Path, stem: str, only: set[str] | None = None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in _files_of(path, stem):
        tensors |= load_tensors(file, only)
    return tensors


def _stored_parts(path: Path, stem: str) -> dict[str, Stored]:
    return {name: one for file in _files_of(path, stem) for name, one in stored_in(file).items()}


def _files_of(path: Path, stem: str) -> list[Path]:
    part = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    names = [name for name in read_manifest(path)["files"] if part.fullmatch(name)]
    return [path / name for name in names or [part_name(stem, 0, 1)]]


def _join(file: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    with disk.plain_words(file, "cannot be read", CheckpointError, *disk.DAMAGE):
        state = tree.join(json.loads(file.read_bytes()), tensors)
        if not isinstance(state, dict):
            raise TypeError(f"it holds {type(state).__name__}, not dict")
    return state
