"""Whether the run in a folder is gone on with, and from where."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

from dtrain.checkpoint import format as files
from dtrain.checkpoint.fits import BY_PLAN, Fit, Fits
from dtrain.checkpoint.format import Saved
from dtrain.checkpoint.status import Status, read, renamed, this_process
from dtrain.errors import ConfigError, ResumeError

ResumeMode = Literal["auto", "never", "must", "emergency"]

#: The folder within ``run_dir`` of what was saved when a step failed.
EMERGENCY = "emergency"
#: And of checkpoints whose weights are NaN or infinite; no start goes on from there.
NOT_FINITE = "not-finite"
#: What of a run must be the same to go on; any other difference is told.
MUST = ("model", "optimizer", "batch size", "seed", "order")
#: And of a run whose next fit begins, which has data of its own.
MUST_BETWEEN = ("model", "optimizer", "seed")
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
    fits: tuple[Fit, ...] = field(default=(), compare=False)  # that the run has had


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call of ``fit`` asks for: which fit of the run it is, and for how long."""

    place: int
    name: str | None
    epochs: int | None
    max_steps: int | None


def check_mode(mode: str) -> None:
    """Refuses what is no way to resume."""
    if mode not in get_args(ResumeMode):
        raise ConfigError(f"resume={mode!r}: choose one of {', '.join(get_args(ResumeMode))}")


def folder_of(run_dir: Path, mode: ResumeMode) -> Path:
    """Returns the folder of the checkpoints that a way to resume goes on from."""
    return run_dir / (EMERGENCY if mode == EMERGENCY else "checkpoints")


def look(
    run_dir: Path,
    mode: ResumeMode,
    own: Iterable[str] = (),
    found: tuple[Saved | None, list[str]] | None = None,
) -> Decision:
    """Looks for the run in ``run_dir``: its newest intact checkpoint, and which fits it has had.

    ``own`` are files in ``run_dir`` that are the run's beside the usual ones; ``found`` is what
    looking for checkpoints gave, if that was done. A ResumeError says that there is none, where
    ``mode`` insists on one. Ranks: rank 0 only.
    """
    check_mode(mode)
    if mode == "never":
        return _set_aside(run_dir, {*_OWN, *own})
    saved, damage = files.find(folder_of(run_dir, mode)) if found is None else found
    notes = [f"left out, because it is damaged: {what}" for what in damage]
    try:
        status = read(run_dir)
    except ResumeError as error:
        if saved is None:
            raise
        status = None
        notes.append(str(error))
    if status is None and saved is not None:  # what the run was when it made the checkpoint
        state = renamed(files.load_plain(saved.path))
        epoch, fits = state["progress"]["epoch"], Fits.of_text(state.get("fits", "[{}]")).known
        facts = {"fingerprint": state["fingerprint"], "fit": len(fits) - 1}
        status = Status("running", "", saved.step, epoch, **facts)
        notes.append("there is no status.json to go by: the checkpoint says of which run it is")
    ended = status is not None and status.status == "finished" and _has_ended(status)
    if status is None or (saved is None and not ended):
        if mode in ("must", EMERGENCY):
            what = "no run" if status is None else "no intact checkpoint"
            if mode == EMERGENCY:
                what = "nothing that was saved when a step failed"
            raise ResumeError(
                f"resume={mode!r}, but there is {what} in {run_dir}"
                + "".join(f"\n  {note}" for note in notes)
            )
        return Decision(None, tuple(notes), status)
    if saved is None:
        raise ResumeError(
            f"{_finished(run_dir, status)}It left no intact checkpoint to go on from. To begin "
            f"another, {_ANEW}"
        )
    return Decision(saved, tuple(notes), status, _fits_of(saved, status))


def _fits_of(saved: Saved, status: Status) -> tuple[Fit, ...]:
    """Returns the fits that a run has had until its newest checkpoint, and how they ended."""
    state = files.load_plain(saved.path)
    fits = Fits.of_text(state.get("fits", "[{}]")).known
    last = fits[-1]
    if status.fit == len(fits) - 1:  # whether its last hooks were called is known there only
        # What a script may go on from holds the fit's end; a script that is over needs to be told.
        held = last.is_over or "fits" not in state or _is_plain(fits, status)
        done = {"reason": status.reason, "steps": status.step, "epochs": status.epoch}
        finished = status.status == "finished" and held
        last = replace(last, **(done if finished else {"reason": ""}))
    return (*fits[:-1], last)


def _is_plain(fits: Sequence[Fit], status: Status) -> bool:
    """Says whether a script had one fit, without a name, and came to its end, if it ended.

    Where there are several, or a name, the script is written to be started again.
    """
    return len(fits) == 1 and status.fit == 0 and not fits[0].name and _has_ended(status)


def _has_ended(status: Status) -> bool:
    """Says whether a script was over where a fit was: one that was killed may have had more."""
    return status.over or status.process in ("", this_process())


def decide(
    found: Decision, fingerprint: Mapping[str, Any], asked: Asked
) -> tuple[bool, tuple[str, ...]]:
    """Decides what becomes of a call of ``fit`` in the run that was found.

    Returns whether there is anything to train (else its result is returned), and what to tell.
    A ResumeError says that the old run is finished, or of another make-up. Ranks: rank 0 only.
    """
    saved, status, fits = found.saved, found.before, found.fits
    assert saved is not None
    assert status is not None
    run_dir = saved.path.parent.parent
    place, last = asked.place, len(fits) - 1
    if place < last:
        return False, ()
    there = status.fingerprint
    if status.fit != place:
        there = renamed(files.load_plain(saved.path)).get("fingerprint", there)
    between = place > last
    if not between:
        fit = fits[place]
        done = fit.fulfils(asked.epochs, asked.max_steps)
        plain = asked.name is None and _is_plain(fits, status)
        if done and plain and not differences(there, fingerprint)[0]:
            raise ResumeError(_finished(run_dir, status) + _choices(run_dir, status))
        between = done and not plain and saved.step >= fit.steps  # its end is what was saved
    must, may = differences(there, fingerprint, MUST_BETWEEN if between else MUST)
    if must:
        raise ResumeError(
            f"the run in {run_dir} is of another make-up:\n"
            + "\n".join(f"  {line}" for line in must)
            + "\nChoose another run_dir, or pass resume='never' to begin anew here (the old files "
            "are moved aside)."
        )
    if between and place == last:
        return False, ()
    same = [key for key, here in fingerprint.items() if there.get(key) == here]
    which = "" if place == 0 else f", fit {place}"
    which = f", fit {asked.name!r}" if asked.name else which
    at = f"step {saved.step}{which}"
    note = f"continuing at {at} from {saved.path} (the same make-up: {', '.join(same)})"
    return True, (note, *([] if between else may))


_ANEW = (
    "choose another run_dir; to begin anew here, pass resume='never' (the old files are moved "
    "aside). Where the script has more to do after this fit, name it, fit(name='main'): its result "
    "is then returned."
)


def _finished(run_dir: Path, status: Status) -> str:
    return (
        f"the run in {run_dir} is finished ({status.reason}; step {status.step}, "
        f"{status.epoch} epochs). "
    )


def _choices(run_dir: Path, status: Status) -> str:
    if status.reason in BY_PLAN:
        return f"To go on, ask for more (a larger epochs or max_steps); to begin another, {_ANEW}"
    return (
        "It stopped by itself, and a larger plan does not undo that. To train its weights "
        f"further, load them (dtrain.load_model({str(run_dir)!r}, model)) and {_ANEW}"
    )


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
    """Compares a further call of a live trainer, of the same fit, with the one before.

    Model and optimizer may have been changed by hand in between; what else must be the same for a
    restart must be for this, or a ConfigError says so.
    """
    must, may = differences(before, now, ("batch size", "order"))
    if must:
        raise ConfigError(
            f"this trainer goes on with the fit that it has begun ({'; '.join(must)}), in which "
            "this must not change. Pass what was passed before; or, once that is over, call a "
            "further fit, of another name."
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
