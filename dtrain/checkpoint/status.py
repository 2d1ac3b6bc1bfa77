"""``run_dir/status.json``: where a run stands; and whether to go on with it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dtrain.checkpoint import format as files
from dtrain.checkpoint import run_lock as run_lock
from dtrain.checkpoint.format import Saved
from dtrain.errors import CheckpointError, ConfigError, CrashLoop, ResumeError

State = Literal["running", "finished", "preempted", "failed"]
ResumeMode = Literal["auto", "never", "must", "emergency"]

#: So often in a row a run may fail without having come any further.
MAX_FAILURES = 3

#: Names a file for a copy of status.json: a batch script does not know what run_dir is.
COPY_VARIABLE = "DTRAIN_STATUS_FILE"

#: The folder within ``run_dir`` of what was saved when a step failed.
EMERGENCY = "emergency"


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


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to continue, from where, and what to tell the user.

    Attributes:
        saved: the checkpoint to continue from, or None to begin.
        notes: what was decided, in plain words.
        before: what the last start left, as far as that can be known.
    """

    saved: Saved | None
    notes: tuple[str, ...] = ()
    before: Status | None = field(default=None, compare=False)


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
        return Status(**_renamed(json.loads(file.read_bytes())))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ResumeError(
            f"{file} cannot be read: {error}. Delete it: what there are of checkpoints is kept."
        ) from error


def prepare(run_dir: Path) -> None:
    """Makes ``run_dir`` and proves that it can be written.

    Raises:
        ConfigError: it cannot.

    Ranks: rank 0 only.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".can-write"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir} cannot be written: {error}") from error


def check_mode(mode: str) -> None:
    """Refuses what is no way to resume.

    Raises:
        ConfigError: ``mode`` is not one of :data:`ResumeMode`.

    Ranks: all, local.
    """
    if mode not in get_args(ResumeMode):
        raise ConfigError(f"resume={mode!r}: choose one of {', '.join(get_args(ResumeMode))}")


def decide(
    run_dir: Path,
    mode: ResumeMode,
    fingerprint: Mapping[str, Any],
    *,
    epochs: int | None,
    max_steps: int | None,
) -> Decision:
    """Decides whether to continue the run in ``run_dir``.

    Args:
        run_dir: the run's folder.
        mode: ``"auto"`` continues an unfinished run, ``"must"`` insists on one, ``"never"``
            begins anew and moves the old run's files aside; ``"emergency"`` insists on what was
            saved when a step failed.
        fingerprint: what this run is made of.
        epochs: how many epochs this run is to have in all, if it counts them.
        max_steps: how many steps, if it counts them.

    Raises:
        ResumeError: the old run is finished, or of another make-up, or there is none.
        ConfigError: ``mode`` is none of these.

    Ranks: rank 0 only.
    """
    check_mode(mode)
    if mode == "never":
        traces = (run_dir / "status.json", run_dir / "checkpoints")
        return _set_aside(run_dir) if any(t.exists() for t in traces) else Decision(None)
    saved, damage = files.find(run_dir / (EMERGENCY if mode == EMERGENCY else "checkpoints"))
    notes = [f"left out, because it is damaged: {what}" for what in damage]
    try:
        status = read(run_dir)
    except ResumeError as error:
        if saved is None:
            raise
        status = None
        notes.append(str(error))
    if status is None and saved is not None:
        status = _said_by(saved)
        notes.append("there is no status.json to go by: the checkpoint says of which run it is")
    if status is None or (saved is None and status.status != "finished"):
        if mode in ("must", EMERGENCY):
            what = "no run" if status is None else "no intact checkpoint"
            if mode == EMERGENCY:
                what = "nothing that was saved when a step failed"
            raise ResumeError(
                f"resume={mode!r}, but there is {what} in {run_dir}"
                + "".join(f"\n  {note}" for note in notes)
            )
        return Decision(None, tuple(notes), status)
    _compare(run_dir, status, fingerprint)
    done_epochs, done_steps = status.epoch, status.step
    more = (epochs is not None and epochs > done_epochs) or (epochs is None and max_steps is None)
    if epochs is None and max_steps is not None:
        more = max_steps > done_steps
    elif max_steps is not None:
        more = more and max_steps > done_steps
    goes_on = more and _by_plan(status.reason) and saved is not None
    if status.status == "finished" and not goes_on:
        raise ResumeError(
            f"the run in {run_dir} is finished ({status.reason}; step {done_steps}, "
            f"{done_epochs} epochs). To go on, ask for more (a larger epochs or max_steps); to "
            "begin another, choose another run_dir; to begin anew here, pass resume='never' (the "
            "old files are moved aside)."
        )
    assert saved is not None
    what = f"continuing at step {saved.step} from {saved.path}"
    compared = f"the same make-up: {', '.join(fingerprint)}"
    return Decision(saved, (*notes, f"{what} ({compared})"), status)


@dataclass(frozen=True, slots=True)
class Failures:
    """How often in a row a run failed without having come any further.

    Attributes:
        at: the furthest step, or -1.
        count: how often.
    """

    at: int = -1
    count: int = 0

    def then(self, step: int) -> Failures:
        """Counts a failure at ``step``."""
        if step > self.at:
            return Failures(step, 1)
        return Failures(self.at, self.count + 1)

    @property
    def is_loop(self) -> bool:
        """Another start would most likely fail in the same way."""
        return self.count >= MAX_FAILURES


def failures_before(before: Status | None, *, restarted: bool) -> Failures:
    """Returns how earlier starts failed, where a launcher goes on starting by itself.

    Args:
        before: what the last start left.
        restarted: whether a launcher started this one by itself; a person has a reason to.

    Raises:
        CrashLoop: the launcher has tried often enough.

    Ranks: rank 0 only.
    """
    if before is None or not restarted or before.status not in ("running", "failed"):
        return Failures()
    failures = Failures(before.failed_at, before.failures)
    if before.status == "running":  # killed: nobody has counted that yet
        failures = failures.then(before.step)
    if failures.is_loop:
        reason = before.reason or "killed"
        raise CrashLoop(
            f"{failures.count} starts in a row came no further than step {failures.at} ({reason}), "
            "so this one does not try again. Mend the cause and start it by hand: that counts from "
            "1."
        )
    return failures


def _said_by(saved: Saved) -> Status:
    """Returns the status of the run that made a checkpoint, when it made it."""
    state = files.load_state(saved.path)
    fingerprint = _renamed(state)["fingerprint"]
    return Status("running", "", saved.step, state["progress"]["epoch"], fingerprint)


def _renamed(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of an older run, under today's names."""
    names = {"make_up": "fingerprint"}  # until 0.1
    return {names.get(name, name): value for name, value in facts.items()}


def _by_plan(reason: str) -> bool:
    """A run that stopped by itself (early stopping) is not continued by a larger plan."""
    return reason in ("all epochs done", "max_steps reached")


def _compare(run_dir: Path, status: Status, fingerprint: Mapping[str, Any]) -> None:
    different = [
        f"  {key}: {status.fingerprint.get(key)!r} there, {value!r} here"
        for key, value in fingerprint.items()
        if status.fingerprint.get(key) != value
    ]
    if different:
        raise ResumeError(
            f"the run in {run_dir} is of another make-up:\n"
            + "\n".join(different)
            + "\nChoose another run_dir, or pass resume='never' to begin anew here (the old files "
            "are moved aside)."
        )


def _set_aside(run_dir: Path) -> Decision:
    number = 1
    while (run_dir / f"before-{number}").exists():
        number += 1
    aside = run_dir / f"before-{number}"
    aside.mkdir()
    for path in sorted(run_dir.iterdir()):
        if not path.name.startswith(("before-", run_lock.TOKEN)):  # whose run_dir it is, stays
            path.rename(aside / path.name)
    return Decision(None, (f"beginning anew; the old run's files are in {aside}",))
