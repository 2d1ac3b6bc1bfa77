"""Whether ``run_dir`` can be written, and all ranks see one: rank 0 leaves a mark, each looks.

A folder that every host has for itself, or that follows from a working directory, would take a
run to its end, and then lack what the other ranks have saved.
"""

import os
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dtrain.distributed import World, some_of
from dtrain.errors import ConfigError, RankMismatch

#: How long a rank looks: a network file system may show a new file late.
PATIENCE_S = 15.0
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class _Place:
    """What a rank has for ``run_dir``."""

    host: str
    run_dir: str
    sees: bool = True


def prepare(run_dir: Path) -> None:
    """Makes ``run_dir`` and proves that it can be written, or raises ConfigError. Local."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".can-write"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be written: {error}") from error


def check_shared(run_dir: Path, world: World) -> None:
    """Raises RankMismatch on all ranks where not all see the folder in which rank 0 writes.

    On rank 0 it is there, and may be written to. Ranks: all, communicates.
    """
    if world.size == 1:
        return
    mark = world.comm.on_main("run_dir", lambda: _leave_mark(run_dir))
    try:
        mine = _Place(world.host, str(run_dir), world.is_main or _appears(run_dir / mark))
        places = world.comm.gather_objects("who sees run_dir", mine)
    finally:
        if world.is_main:
            with suppress(OSError):  # it is empty, and nobody looks for it again
                (run_dir / mark).unlink()
    if not all(place.sees for place in places):
        raise RankMismatch(_describe(places))


def _leave_mark(run_dir: Path) -> str:
    """A name that no host has asked for yet: of one that it has, it may remember the absence."""
    mark = f".seen-{uuid.uuid4().hex}"
    (run_dir / mark).touch()
    return mark


def _appears(file: Path) -> bool:
    deadline, never = time.monotonic() + PATIENCE_S, threading.Event()
    while not file.exists():
        if time.monotonic() >= deadline:
            return False
        for folder in (file.parent.parent, file.parent):
            with suppress(OSError):  # opened, NFS asks its server anew what is there
                os.close(os.open(folder, os.O_RDONLY))
        never.wait(_LOOK_EVERY_S)
    return True


def _describe(places: list[_Place]) -> str:
    first = places[0]
    blind = [rank for rank, place in enumerate(places) if not place.sees]
    others = {place.run_dir for place in places} - {first.run_dir}
    rows = "\n".join(
        f"  rank {rank} on {place.host}: {place.run_dir}" + ("" if place.sees else "  (another)")
        for rank, place in enumerate(places)
        if rank in (0, *blind[:8])
    )
    if others:
        remedy = (
            "The paths differ. A relative run_dir is of the working directory, which is another "
            "on each rank here, or the script names it by the time, the rank or what a sweep's "
            "tool made for each process: choose it once, as with "
            'dtrain.on_main("run_dir", lambda: ...), and give all ranks the same'
        )
    else:
        remedy = (
            "The path is the same, so each of these hosts has a folder of its own by that name: "
            "choose one on a file system that all hosts share"
        )
    more = f"\n  and {len(blind) - 8} more ranks" if len(blind) > 8 else ""
    return (
        f"rank {some_of([str(rank) for rank in blind])} does not see the run_dir in which rank 0 "
        f"writes, and all that they were to save would be lost. {remedy}.\n{rows}{more}"
    )
