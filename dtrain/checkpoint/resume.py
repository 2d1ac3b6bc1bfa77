"""Whether the run in a folder is gone on with, and from where."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

from dtrain.checkpoint import format as files
from dtrain.checkpoint.format import Saved
from dtrain.checkpoint.status import Status, read, renamed
from dtrain.errors import ConfigError, ResumeError

ResumeMode = Literal["auto", "never", "must", "emergency"]

#: The folder within ``run_dir`` of what was saved when a step failed.
EMERGENCY = "emergency"
#: And of checkpoints whose weights are NaN or infinite; no start goes on from there.
NOT_FINITE = "not-finite"
#: What of a run must be the same to go on; any other difference is told.
MUST = ("model", "optimizer", "batch size", "seed", "order")
_MEANS = {
    "samples": "an epoch's order is drawn from those here; in one under way, some may come twice "
    "or not at all",
    "callbacks": "those here are used",
}
#: What dtrain leaves in a run's folder, and ``resume="never"`` moves aside.
_OWN = (
    *("status.json", "config.json", "checkpoints", EMERGENCY, NOT_FINITE, "samples", "profile"),
    *("metrics.jsonl", "metrics.csv", "tensorboard", "wandb", "wandb-id.txt"),
)


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
    own: Iterable[str] = (),
) -> Decision:
    """Decides whether to continue the run in ``run_dir``, as ``Trainer.fit`` tells of ``mode``.

    ``own`` are files in ``run_dir`` that are the run's beside the usual ones. A ResumeError says
    that the old run is finished, or of another make-up, or that there is none.
    Ranks: rank 0 only.
    """
    check_mode(mode)
    if mode == "never":
        return _set_aside(run_dir, {*_OWN, *own})
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
    must, may = differences(status.fingerprint, fingerprint)
    if must:
        raise ResumeError(
            f"the run in {run_dir} is of another make-up:\n"
            + "\n".join(f"  {line}" for line in must)
            + "\nChoose another run_dir, or pass resume='never' to begin anew here (the old files "
            "are moved aside)."
        )
    limits = ((epochs, status.epoch), (max_steps, status.step))
    more = all(limit is None or limit > done for limit, done in limits)
    # A run that stopped by itself (early stopping) is not continued by a larger plan.
    by_plan = status.reason in ("all epochs done", "max_steps reached")
    if saved is None or (status.status == "finished" and not (more and by_plan)):
        ended = f"the run in {run_dir} is finished ({status.reason}; step {status.step}, "
        ended += f"{status.epoch} epochs). "
        anew = (
            "choose another run_dir; to begin anew here, pass resume='never' (the old files are "
            "moved aside)."
        )
        if by_plan and saved is not None:
            ended += "To go on, ask for more (a larger epochs or max_steps); to begin another, "
        elif saved is not None:
            ended += (
                "It stopped by itself, and a larger plan does not undo that. To train its weights "
                f"further, load them (dtrain.load_model({str(run_dir)!r}, model)) and "
            )
        else:
            ended += "It left no intact checkpoint to go on from. To begin another, "
        raise ResumeError(ended + anew)
    same = [key for key, here in fingerprint.items() if status.fingerprint.get(key) == here]
    notes.append(
        f"continuing at step {saved.step} from {saved.path} (the same make-up: {', '.join(same)})"
    )
    return Decision(saved, (*notes, *may), status)


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], must: Iterable[str] = MUST
) -> tuple[list[str], list[str]]:
    """Returns how two fingerprints differ, in words: where they must not, and where they may.

    What is not in ``there`` was not noted yet when that run was begun.
    """
    lines: tuple[list[str], list[str]] = [], []
    for key, new in here.items():
        if key in there and (old := there[key]) != new:
            if key in must:
                lines[0].append(f"{key}: {old!r} there, {new!r} here")
            else:
                means = _MEANS.get(key, "what is here is used")
                lines[1].append(f"{key}: {old!r} there, {new!r} here ({means})")
    return lines


def compare_fits(
    before: Mapping[str, Any], now: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """Compares a further ``fit`` of a live trainer with the one before.

    Model and optimizer may have been changed by hand in between; what else must be the same for a
    restart must be for this, or a ConfigError says so.
    """
    must, may = differences(before, now, ("batch size", "order"))
    if must:
        raise ConfigError(
            f"this trainer goes on with the run that it has begun ({'; '.join(must)}), in which "
            "this must not change. Pass what was passed before, or make another Trainer of the "
            "model (with another run_dir)."
        )
    for line in may:
        say(line)


def _set_aside(run_dir: Path, own: set[str]) -> Decision:
    """Moves an old run's files aside, if there are any; what is not dtrain's stays."""
    if not any((run_dir / trace).exists() for trace in ("status.json", "checkpoints")):
        return Decision(None)
    names = (run_dir / f"before-{number}" for number in count(1))
    aside = next(name for name in names if not name.exists())
    aside.mkdir()
    for path in sorted(run_dir.iterdir()):
        if path.name in own:
            path.rename(aside / path.name)
    return Decision(None, (f"beginning anew; the old run's files are in {aside}",))
