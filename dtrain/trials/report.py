"""What a check or a drill found, as values and in plain words."""

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they need torch
    from dtrain.trials.check_compare import Comparison
    from dtrain.trials.drill_compare import Difference

_WIDTH = 92
_TENSORS, _DIFFERENCES = 5, 4  # of a run or trial, that are shown by name

_ADVICE = (
    "What to do: whatever changes from step to step must be in the checkpoint or follow from the "
    "step's number. A callback returns it from state_dict and takes it back in load_state_dict; "
    "a random number comes from ctx.rng, ctx.shared_rng or torch's global stream; a stream of "
    "batches gives the same batches each time that it is iterated anew."
)


@dataclass(frozen=True, slots=True)
class TrialReport:
    """A report; ``str()`` of it is all of it, as plain text."""

    headline: str  # the verdict, in a sentence
    passed: bool
    columns: tuple[str, ...]
    rows: list[tuple[tuple[str, ...], bool]]  # and whether each is good
    paragraphs: list[str]  # what follows the table

    def __str__(self) -> str:
        lines = [self.columns, *(row for row, _ in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in lines
        )
        return "\n\n".join([self.headline, table, *self.paragraphs])


@dataclass(frozen=True, slots=True)
class Cause:
    """Why numbers part."""

    name: str  # short, such as "ragged mean"
    evidence: str  # what was seen, with values
    remedy: str  # what to do


@dataclass(frozen=True, slots=True)
class Equivalence:
    """What :func:`dtrain.check_equivalence` found; ``str()`` of it is the report."""

    script: str
    steps: int  # how many global steps were compared
    dtype: str  # what it was computed in
    runs: "tuple[Comparison, ...]"  # each against one rank with one micro-batch
    causes: tuple[Cause, ...] = ()  # why numbers part, where they do
    #: Parameters that differ only because their gradient is zero but for rounding.
    zero_gradients: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what else is worth knowing

    @property
    def passed(self) -> bool:
        """Every run gives the numbers of one rank with one micro-batch."""
        return all(run.equal for run in self.runs)

    @property
    def report(self) -> TrialReport:
        """All of it in words."""
        headline = f"{self.script}, {plural(self.steps, 'step')} in {self.dtype}"
        if self.passed:
            headline = f"EQUAL: {headline}: the numbers do not depend on ranks or micro-batches."
        else:
            parted = f"{sum(not run.equal for run in self.runs)} of {len(self.runs)} runs part"
            headline = f"NOT EQUAL: {headline}: {parted} from 1 rank x 1 micro-batch."
        columns = ("run", "loss off by", "worst tensor", "gradient off by", "verdict")
        rows = [(_row_of_run(run), run.equal) for run in self.runs]
        parts = []
        worst = max(self.runs, key=lambda run: len(run.parted), default=None)
        if worst is not None and worst.parted:
            what = "Parameters" if worst.first_step is None else "Gradients"
            title = f"{what} that part on {worst.title}, relative to their size:"
            lines = [
                f"  {p.name}: {_gap(p.gap)}"
                + (" (only the parameter)" if p.step is None else f", from step {p.step + 1} on")
                for p in worst.parted
            ]
            parts.append("\n".join([title, *_and_more(lines, _TENSORS)]))
        for cause in self.causes:
            remedy = _fill(f"What to do: {cause.remedy}", "  ")
            parts.append(f"Cause: {cause.name}\n{_fill(cause.evidence, '  ')}\n{remedy}")
        if self.zero_gradients:
            parts.append(
                "Zero gradient, so not compared (an optimizer like Adam turns rounding into "
                f"steps):\n{_fill(', '.join(self.zero_gradients), '  ')}"
            )
        parts += [_fill(f"Note: {note}") for note in self.notes]
        return TrialReport(headline, self.passed, columns, rows, parts)

    def __str__(self) -> str:
        return str(self.report)


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What became of one run that was disturbed and started again."""

    done: str  # to it
    at: int  # at which step
    went_on_from: tuple[int, ...]  # the step of each further start
    differences: "tuple[Difference, ...]" = ()  # from the undisturbed run, the first one first
    failure: str = ""  # why it never came to its end, if it did not

    @property
    def passed(self) -> bool:
        return not self.differences and not self.failure


@dataclass(frozen=True, slots=True)
class Drilled:
    """What a drill found; ``str()`` of it is the report."""

    script: str
    ranks: int
    steps: int  # global steps of each run
    seed: int  # of the disturbances
    trials: tuple[TrialResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(trial.passed for trial in self.trials)

    @property
    def report(self) -> TrialReport:
        ranks = plural(self.ranks, "rank")
        headline = f"{self.script}, {self.steps} steps on {ranks}, seed {self.seed}"
        if self.passed:
            headline = f"SURVIVES: {headline}: every trial ended as the run that was left alone."
        else:
            failed = f"{sum(not trial.passed for trial in self.trials)} of {len(self.trials)}"
            headline = f"DOES NOT SURVIVE: {headline}: {failed} trials ended otherwise."
        rows = [(_row_of_trial(trial), trial.passed) for trial in self.trials]
        parts: dict[tuple[str, str], str] = {}  # what is told once; the table says where else
        for trial in self.trials:
            where = f"{trial.done}, at step {trial.at}"
            if trial.failure:
                lines = trial.failure.splitlines()
                key = lines[0], lines[-1]
                parts.setdefault(key, f"Never came to its end ({where}):\n{trial.failure}")
            elif trial.differences:
                key = trial.differences[0].what, trial.differences[0].name
                parts.setdefault(key, _differing(where, trial.differences))
        advice = [_fill(_ADVICE)] if any(trial.differences for trial in self.trials) else []
        paragraphs = [*parts.values(), *advice, *(_fill(f"Note: {note}") for note in self.notes)]
        columns = ("done", "at step", "went on from", "result")
        return TrialReport(headline, self.passed, columns, rows, paragraphs)

    def __str__(self) -> str:
        return str(self.report)


def plural(count: int, what: str) -> str:
    """Returns such as ``2 ranks``."""
    return f"{count} {what}{'s' * (count != 1)}"


def _row_of_run(run: "Comparison") -> tuple[str, ...]:
    if run.equal:
        verdict = "equal"
    elif run.strays:
        verdict = "ranks drift apart"
    else:
        verdict = "parts" if run.first_step is None else f"parts at step {run.first_step + 1}"
    worst = run.worst if run.worst_gap else "(none)"
    return run.title, _gap(run.loss_gap), worst, _gap(run.worst_gap), verdict


def _row_of_trial(trial: TrialResult) -> tuple[str, ...]:
    went_on = ", ".join(map(str, trial.went_on_from)) or "(nowhere)"
    result = "never ended" if trial.failure else "equal"
    if trial.differences:
        first = trial.differences[0]
        verb = "differ" if first.what == "samples" else "differs"
        when = "the end" if first.step == float("inf") else f"step {first.step:g}"
        result = f"{first.name} {verb} at {when}"
    return trial.done, str(trial.at), went_on, result


def _differing(where: str, differences: "tuple[Difference, ...]") -> str:
    """Returns what differs in a trial: of each figure and tensor, where it does so first."""
    firsts: dict[tuple[str, str], Difference] = {}
    for one in differences:
        firsts.setdefault((one.what, one.name), one)
    first, *others = (_fill(one.words, "  ") for one in firsts.values())
    then = ["Then:", *_and_more(others, _DIFFERENCES)] if others else []
    return "\n".join([f"First difference ({where}):", first, *then])


def _gap(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _fill(text: str, indent: str = "") -> str:
    wrapper = textwrap.TextWrapper(_WIDTH, indent, indent)
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.fill(text)


def _and_more(lines: list[str], most: int) -> list[str]:
    more = len(lines) - most
    return lines[:most] + [f"  and {more} more"] * (more > 0)
