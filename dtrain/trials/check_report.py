"""What a check found, as values and in plain words."""

from dataclasses import dataclass

from dtrain.trials.check_compare import Comparison
from dtrain.trials.report import TrialReport, and_more, fill, plural

_COLUMNS = ("run", "loss off by", "worst tensor", "gradient off by", "verdict")
_SHOWN = 5  # tensors of a run, by name


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
    runs: tuple[Comparison, ...]  # each against one rank with one micro-batch
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
        rows = [(_row(run), run.equal) for run in self.runs]
        parts = []
        worst = max(self.runs, key=lambda run: len(run.parted), default=None)
        if worst is not None and worst.parted:
            what = "Parameters" if worst.first_step is None else "Gradients"
            lines = [
                f"  {p.name}: {_gap(p.gap)}"
                + (" (only the parameter)" if p.step is None else f", from step {p.step + 1} on")
                for p in worst.parted
            ]
            title = f"{what} that part on {worst.title}, relative to their size:"
            parts.append("\n".join([title, *and_more(lines, _SHOWN)]))
        for cause in self.causes:
            remedy = fill(f"What to do: {cause.remedy}", "  ")
            parts.append(f"Cause: {cause.name}\n{fill(cause.evidence, '  ')}\n{remedy}")
        if self.zero_gradients:
            parts.append(
                "Zero gradient, so not compared (an optimizer like Adam turns rounding into "
                f"steps):\n{fill(', '.join(self.zero_gradients), '  ')}"
            )
        parts += [fill(f"Note: {note}") for note in self.notes]
        return TrialReport(headline, self.passed, _COLUMNS, rows, parts)

    def __str__(self) -> str:
        return str(self.report)


def _row(run: Comparison) -> tuple[str, ...]:
    if run.equal:
        verdict = "equal"
    elif run.strays:
        verdict = "ranks drift apart"
    else:
        verdict = "parts" if run.first_step is None else f"parts at step {run.first_step + 1}"
    worst = run.worst if run.worst_gap else "(none)"
    return run.title, _gap(run.loss_gap), worst, _gap(run.worst_gap), verdict


def _gap(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
