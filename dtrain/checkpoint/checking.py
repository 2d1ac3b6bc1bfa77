"""Whether checkpoints are intact: each byte is read once, by one rank, and all know what was found.

Ranks: all, communicates.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dtrain.checkpoint import disk
from dtrain.checkpoint import format as files
from dtrain.checkpoint.format import Saved
from dtrain.distributed import Phase, World
from dtrain.errors import CheckpointError

_READING = Phase("reading a checkpoint", slow=True)
#: A piece of a file: its name, from where, and how many bytes.
_Piece = tuple[str, int, int]


def find_together(folder: Path, world: World) -> tuple[Saved | None, list[str]]:
    """Returns the newest intact checkpoint, and what is wrong with newer ones; equal on all ranks.

    As ``format.find`` does by itself.
    """
    damage: list[str] = []
    for path in world.comm.on_main("checkpoints there", lambda: files.newest_first(folder)):
        found = _check(path, world)
        if isinstance(found, Saved):
            return found, damage
        damage.append(found)
    return None, damage


def _check(path: Path, world: World) -> Saved | str:
    """Compares a checkpoint's files with its manifest; returns what the first trouble is."""
    comm = world.comm
    manifest = comm.on_main("manifest", lambda: _manifest_of(path))
    if isinstance(manifest, str):
        return manifest
    pieces = _pieces(manifest)
    mine = pieces[world.rank :: world.size]
    before = comm.activity.enter(_READING)
    found = disk.at_once([partial(_digest, path, piece, world) for piece in mine])
    by_rank = comm.gather_objects("checksums", dict(zip(mine, found, strict=True)))
    comm.activity.enter(before)
    every = {piece: digest for one in by_rank for piece, digest in one.items()}
    for name, facts in manifest["files"].items():
        digests = []
        for digest in (every[piece] for piece in pieces if piece[0] == name):
            if isinstance(digest, str):
                return digest
            digests.append(digest)
        if trouble := files.differs(path / name, disk.joint(digests), facts):
            return trouble
    return Saved(path, manifest["step"], manifest["metrics"])


def _manifest_of(path: Path) -> dict[str, Any] | str:
    """Returns the manifest, of a checkpoint whose files have the sizes that it says; or why not."""
    try:
        manifest = files.read_manifest(path)
        for name, facts in manifest["files"].items():
            files.check_size(path / name, facts)
    except CheckpointError as error:
        return str(error)
    return manifest


def _pieces(manifest: Mapping[str, Any]) -> list[_Piece]:
    pieces: list[_Piece] = []
    for name, facts in manifest["files"].items():
        size = facts["bytes"]
        step = facts.get("piece", 0) or size or 1
        pieces += [(name, at, min(step, size - at)) for at in range(0, max(size, 1), step)]
    return pieces


def _digest(path: Path, piece: _Piece, world: World) -> bytes | str:
    """Returns the checksum of a piece, or why it cannot be read on this rank."""
    name, at, size = piece
    try:
        with disk.plain_words(path / name, f"cannot be read on rank {world.rank}"):
            digest = disk.digest_piece(path / name, at, size)
    except CheckpointError as error:
        return str(error)
    world.comm.activity.enter(_READING)  # still at work
    return digest
