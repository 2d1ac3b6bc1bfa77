"""``run_dir/status.json``: where a run stands, and whether it fails again and again."""

import errno
import json
import os
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dtrain.checkpoint import disk
from dtrain.checkpoint.run_lock import RunLock
from dtrain.distributed import World
from dtrain.errors import CrashLoop, DtrainError, ResumeError

State = Literal["running", "finished", "preempted", "failed"]

#: Names a file for a copy of status.json: a batch script does not know what run_dir is.
COPY_VARIABLE = "DTRAIN_STATUS_FILE"
#: So often in a row a run may fail without having come any further.
MAX_FAILURES = 3
_LONGEST = 300  # characters of a reason in a sentence
_PROCESS = uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Status:
    """Where a run stands."""

    status: State  # running (or killed before it could say more), finished, preempted or failed
    reason: str = ""  # in plain words
    step: int = 0  # global steps taken
    epoch: int = 0  # epochs finished
    # What the run is made of; a run is continued only by one of the same make-up.
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    # Where and how often in a row the run failed, as in Failures.
    failed_at: int = -1
    failures: int = 0
    # False where there is nothing left to do, or another start would only fail in the same way.
    requeue: bool = True
    saved: int = -1  # the step of the newest checkpoint; -1 where there is none
    fit: int = 0  # which of the run's fits, from 0
    process: str = ""  # which one wrote this
    over: bool = False  # the script has ended, too, as far as that can be seen
    sentence: str = ""  # all this, to end a log with
    updated: float = field(default_factory=time.time)  # in seconds since 1970


def describe(status: Status) -> str:
    """Says in one sentence what became of a run that has ended with this, and what is saved."""
    # Who failed is part of what a RemoteError says.
    reason = status.reason.partition("\n")[0].removeprefix("RemoteError: ")
    if len(reason) > _LONGEST:
        reason = reason[:_LONGEST] + "..."
    step = f"step {status.step}"
    saved = f"saved at step {status.saved}" if status.saved >= 0 else "nothing is saved"
    if status.status == "finished":
        return f"finished after {status.step} steps ({reason})"
    if status.status == "preempted":
        return f"left after {status.step} steps ({reason}), {saved}"
    if status.status == "running":  # it could not say more
        return f"killed at {step} or later, {saved}"
    if status.failures > 1:
        often = f"{status.failures} times in a row, never beyond step {status.failed_at}"
        return f"failed {often} ({reason}), {saved}"
    return f"failed at {step} ({reason}), {saved}"


def write(run_dir: Path, status: Status) -> None:
    """Replaces ``run_dir/status.json`` in one piece; and its copy, if one is wanted."""
    status = replace(status, sentence=describe(status))
    text = json.dumps(asdict(status), indent=1) + "\n"
    copy = os.environ.get(COPY_VARIABLE)
    for path in (run_dir / "status.json", *([Path(copy)] if copy else ())):
        aside = path.with_name(f".{path.name}.writing")
        with disk.plain_words(path, "cannot be written"):
            try:
                disk.write_bytes(aside, text.encode())  # or a power cut might leave an empty file
                os.replace(aside, path)
            except OSError as error:
                aside.unlink(missing_ok=True)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                disk.overwrite(path, text.encode())


def this_process() -> str:
    """Returns a name for this process, which no other one has."""
    return f"{_PROCESS}-{os.getpid()}"


def script_ends(lock: RunLock, world: World) -> None:
    """Has a run that is finished be known to go on with no further fit; nobody waits for this.

    But where the script ends by an exception, or as it was told to leave: it may be started again
    to go on.
    """
    failed = sys.exception() is not None or hasattr(sys, "last_value")
    with suppress(OSError, DtrainError):
        now = read(lock.run_dir)
        if now is not None and now.status == "finished" and not world.told_to_leave:
            lock.check()  # another start may have begun since
            write(lock.run_dir, replace(now, over=not failed, requeue=False))


def read(run_dir: Path) -> Status | None:
    """Returns where the run in ``run_dir`` stands, or None if there is none.

    Raises ResumeError where status.json is there but cannot be read.
    """
    file = run_dir / "status.json"
    try:
        return Status(**renamed(json.loads(file.read_bytes())))
    except FileNotFoundError:
        return None
    except (OSError, *disk.DAMAGE) as error:
        raise ResumeError(
            f"{file} cannot be read: {error}. Delete it: what there are of checkpoints is kept."
        ) from error


def renamed(facts: dict[str, Any]) -> dict[str, Any]:
    """Returns facts of an older run under today's names."""
    names = {"make_up": "fingerprint"}  # until 0.1
    return {names.get(name, name): value for name, value in facts.items()}


class Failures(NamedTuple):
    """How often in a row a run failed without having come any further."""

    at: int = -1  # the furthest step; of a run that was killed, the last one that it told of
    times: int = 0

    def then(self, step: int) -> "Failures":
        """Counts a failure at ``step``."""
        return Failures(step, 1) if step > self.at else Failures(self.at, self.times + 1)

    @property
    def is_loop(self) -> bool:
        """Another start would most likely fail in the same way."""
        return self.times >= MAX_FAILURES


def failures_before(run_dir: Path, before: Status) -> Failures:
    """Returns how earlier starts failed; raises CrashLoop where a launcher tried often enough.

    For a start that a launcher makes by itself; a person has a reason to.
    """
    if before.status == "preempted" or (before.status == "finished" and not before.requeue):
        return Failures()
    failures = Failures(before.failed_at, before.failures)
    if before.status != "failed":  # killed: nobody has counted that yet
        failures = failures.then(before.step)
    if failures.is_loop:
        reason = before.reason or "killed"
        loop = CrashLoop(
            f"{failures.times} starts in a row came no further than step {failures.at} ({reason}), "
            "so this one does not try again. Mend the cause and start it by hand: that counts from "
            "1."
        )
        write(run_dir, replace(before, requeue=False))
        sys.stderr.write(f"dtrain: {loop}\n")  # a SystemExit is not printed
        raise loop
    return failures
