"""Whether the run in a folder is gone on with, and from where."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

from dtrain.checkpoint import format as files
from dtrain.checkpoint.format import Saved
from dtrain.checkpoint.run_lock import TOKEN
from dtrain.checkpoint.status import Status, read, renamed
from dtrain.errors import ConfigError, ResumeError

ResumeMode = Literal["auto", "never", "must", "emergency"]

#: The folder within ``run_dir`` of what was saved when a step failed.
EMERGENCY = "emergency"
#: And of checkpoints whose weights are NaN or infinite; no start goes on from there.
NOT_FINITE = "not-finite"


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to continue, from where, and what to tell the user."""

    saved: Saved | None  # the checkpoint to continue from, or None to begin
    notes: tuple[str, ...] = ()  # what was decided, in plain words
    # What the last start left, as far as that can be known.
    before: Status | None = field(default=None, compare=False)


def check_mode(mode: str) -> None:
    """Refuses what is no way to resume."""
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
    """Decides whether to continue the run in ``run_dir``, as ``Trainer.fit`` tells of ``mode``.

    A ResumeError says that the old run is finished, or of another make-up, or that there is none.
    Ranks: rank 0 only.
    """
    check_mode(mode)
    if mode == "never":
        return _set_aside(run_dir)
    saved, damage = files.find(run_dir / (EMERGENCY if mode == EMERGENCY else "checkpoints"))
    notes = [f"left out, because it is damaged: {what}" for what in damage]
    try:
        status = read(run_dir)
    except ResumeError as error:
        if saved is None:
            raise
        status = None
        notes.append(str(error))
    if status is None and saved is not None:  # what the run was when it made the checkpoint
        state = renamed(files.load_state(saved.path))
        epoch = state["progress"]["epoch"]
        status = Status("running", "", saved.step, epoch, state["fingerprint"])
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
    limits = ((epochs, status.epoch), (max_steps, status.step))
    more = all(limit is None or limit > done for limit, done in limits)
    # A run that stopped by itself (early stopping) is not continued by a larger plan.
    by_plan = status.reason in ("all epochs done", "max_steps reached")
    if saved is None or (status.status == "finished" and not (more and by_plan)):
        raise ResumeError(
            f"the run in {run_dir} is finished ({status.reason}; step {status.step}, "
            f"{status.epoch} epochs). To go on, ask for more (a larger epochs or max_steps); to "
            "begin another, choose another run_dir; to begin anew here, pass resume='never' (the "
            "old files are moved aside)."
        )
    compared = f"the same make-up: {', '.join(fingerprint)}"
    notes.append(f"continuing at step {saved.step} from {saved.path} ({compared})")
    return Decision(saved, tuple(notes), status)


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
    """Moves an old run's files aside, if there are any."""
    if not any((run_dir / trace).exists() for trace in ("status.json", "checkpoints")):
        return Decision(None)
    names = (run_dir / f"before-{number}" for number in count(1))
    aside = next(name for name in names if not name.exists())
    aside.mkdir()
    for path in sorted(run_dir.iterdir()):
        if not path.name.startswith(("before-", TOKEN)):  # whose run_dir it is, stays
            path.rename(aside / path.name)
    return Decision(None, (f"beginning anew; the old run's files are in {aside}",))
