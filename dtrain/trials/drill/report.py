"""What a drill found, as values and in plain words."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from dtrain.trials.drill.compare import Difference
from dtrain.trials.equivalence.report import as_text

_WIDTH = 92
_SHOWN = 4  # differences of a trial, beside the first

#: The columns of the table.
COLUMNS = ("done", "at step", "went on from", "result")


@dataclass(frozen=True, slots=True)
class Trial:
    """One run that was struck and started again.

    Attributes:
        done: what was done to it.
        at: at which step.
        went_on_from: the step that each further start went on from.
        differences: from the undisturbed run; what comes first is first.
        failure: why it never came to its end, if it did not.
    """

    done: str
    at: int
    went_on_from: tuple[int, ...]
    differences: tuple[Difference, ...] = ()
    failure: str = ""

    @property
    def passed(self) -> bool:
        """It came to its end, and to the same one."""
        return not self.differences and not self.failure


@dataclass(frozen=True, slots=True)
class Drilled:
    """What :func:`dtrain.trials.drill.drill` found; ``str()`` of it is the report.

    Attributes:
        script: which.
        ranks: how many.
        steps: how many global steps each run had.
        seed: which faults were drawn.
        trials: in order.
        notes: what else is worth knowing.
    """

    script: str
    ranks: int
    steps: int
    seed: int
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """All trials ended as the undisturbed run did."""
        return all(trial.passed for trial in self.trials)

    def __str__(self) -> str:
        return "\n\n".join([headline(self), as_text(COLUMNS, rows(self)), *paragraphs(self)])


def headline(found: Drilled) -> str:
    """Returns the verdict, in a sentence."""
    ranks = f"{found.ranks} rank{'s' * (found.ranks > 1)}"
    what = f"{found.script}, {found.steps} steps on {ranks}, seed {found.seed}"
    if found.passed:
        return f"SURVIVES: {what}: every trial ended as the run that was left alone."
    count = sum(not trial.passed for trial in found.trials)
    return f"DOES NOT SURVIVE: {what}: {count} of {len(found.trials)} trials ended otherwise."


def rows(found: Drilled) -> list[tuple[str, ...]]:
    """Returns the table's rows, as text in the order of :data:`COLUMNS`."""
    return [
        (
            trial.done,
            str(trial.at),
            ", ".join(str(step) for step in trial.went_on_from) or "(nowhere)",
            _result(trial),
        )
        for trial in found.trials
    ]


def paragraphs(found: Drilled) -> list[str]:
    """Returns all that follows the table: what differs, and notes."""
    parts = []
    told: set[tuple[str, str]] = set()
    for trial in found.trials:
        where = f"{trial.done}, at step {trial.at}"
        if trial.failure:
            lines = trial.failure.splitlines()
            if (lines[0], lines[-1]) not in told:
                parts.append(f"Never came to its end ({where}):\n{trial.failure}")
            told.add((lines[0], lines[-1]))
        elif trial.differences:
            first = trial.differences[0]
            if (first.what, first.name) not in told:  # else the table says all that is new
                parts.append(_differing(where, trial.differences))
            told.add((first.what, first.name))
    if any(trial.differences for trial in found.trials):
        parts.append(_fill(_ADVICE))
    parts += [_fill(f"Note: {note}") for note in found.notes]
    return parts


_ADVICE = (
    "What to do: whatever changes from step to step must be in the checkpoint or follow from the "
    "step's number. A callback returns it from state_dict and takes it back in load_state_dict; "
    "a random number comes from ctx.rng, ctx.shared_rng or torch's global stream; a stream of "
    "batches gives the same batches each time that it is iterated anew."
)


def _differing(where: str, differences: tuple[Difference, ...]) -> str:
    """Returns what differs in a trial: of each figure and tensor, where it does so first."""
    firsts: dict[tuple[str, str], Difference] = {}
    for one in differences:
        firsts.setdefault((one.what, one.name), one)
    first, *others = firsts.values()
    lines = [f"First difference ({where}):", _fill(first.words, "  ")]
    if others:
        lines.append("Then:")
        lines += [_fill(other.words, "  ") for other in others[:_SHOWN]]
    more = len(others) - _SHOWN
    lines += [f"  and {more} more"] * (more > 0)
    return "\n".join(lines)


def _result(trial: Trial) -> str:
    if trial.failure:
        return "never ended"
    if not trial.differences:
        return "equal"
    first = trial.differences[0]
    if first.step == float("inf"):
        return f"{first.name} differs at the end"
    return (
        f"{first.name} {'differ' if first.what == 'samples' else 'differs'} at step {first.step:g}"
    )


def _fill(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
