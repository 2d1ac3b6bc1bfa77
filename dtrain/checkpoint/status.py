"""``run_dir/status.json``: where a run stands."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dtrain.errors import CheckpointError, ResumeError

State = Literal["running", "finished", "preempted", "failed"]

#: Names a file for a copy of status.json: a batch script does not know what run_dir is.
COPY_VARIABLE = "DTRAIN_STATUS_FILE"


@dataclass(frozen=True, slots=True)
class Status:
    """Where a run stands.

    Attributes:
        status: ``running`` (or killed before it could say more), ``finished``, ``preempted``
            or ``failed``.
        reason: why, in plain words.
        step: global steps taken.
        epoch: epochs finished.
        fingerprint: what the run is made of; a run is continued only by one of the same make-up.
        failed_at: the furthest step at which the run failed, or -1. Of a run that was killed before
            it could tell, the last step that it told of.
        failures: how often in a row it came no further.
        requeue: False where another start would only fail in the same way.
        updated: when this was written, in seconds since 1970.
    """

    status: State
    reason: str = ""
    step: int = 0
    epoch: int = 0
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    failed_at: int = -1
    failures: int = 0
    requeue: bool = True
    updated: float = field(default_factory=time.time)


def write(run_dir: Path, status: Status) -> None:
    """Replaces ``run_dir/status.json`` in one piece; and its copy, if one is wanted.

    Raises:
        CheckpointError: it cannot be written.

    Ranks: rank 0 only.
    """
    text = json.dumps(asdict(status), indent=1) + "\n"
    _replace(run_dir / "status.json", text)
    if copy := os.environ.get(COPY_VARIABLE):
        _replace(Path(copy), text)


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.writing")
    try:
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a power cut might leave an empty file under the name
        os.replace(aside, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def read(run_dir: Path) -> Status | None:
    """Returns where the run in ``run_dir`` stands, or None if there is none.

    Raises:
        ResumeError: status.json is there but cannot be read.

    Ranks: all, local.
    """
    file = run_dir / "status.json"
    try:
        return Status(**renamed(json.loads(file.read_bytes())))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ResumeError(
            f"{file} cannot be read: {error}. Delete it: what there are of checkpoints is kept."
        ) from error


def renamed(facts: dict[str, Any]) -> dict[str, Any]:
    """Returns facts of an older run under today's names.

    Ranks: all, local.
    """
    names = {"make_up": "fingerprint"}  # until 0.1
    return {names.get(name, name): value for name, value in facts.items()}
