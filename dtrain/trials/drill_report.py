"""What a drill found, as values and in plain words."""

from dataclasses import dataclass

from dtrain.trials.drill_compare import Difference
from dtrain.trials.report import TrialReport, and_more, fill, plural

_COLUMNS = ("done", "at step", "went on from", "result")
_SHOWN = 4  # differences of a trial, beside the first

_ADVICE = (
    "What to do: whatever changes from step to step must be in the checkpoint or follow from the "
    "step's number. A callback returns it from state_dict and takes it back in load_state_dict; "
    "a random number comes from ctx.rng, ctx.shared_rng or torch's global stream; a stream of "
    "batches gives the same batches each time that it is iterated anew."
)


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What became of one run that was disturbed and started again."""

    done: str  # to it
    at: int  # at which step
    went_on_from: tuple[int, ...]  # the step of each further start
    differences: tuple[Difference, ...] = ()  # from the undisturbed run, the first one first
    failure: str = ""  # why it never came to its end, if it did not

    @property
    def passed(self) -> bool:
        """It came to its end, and to the same one."""
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
        """All trials ended as the undisturbed run did."""
        return all(trial.passed for trial in self.trials)

    @property
    def report(self) -> TrialReport:
        """All of it in words."""
        ranks = plural(self.ranks, "rank")
        headline = f"{self.script}, {self.steps} steps on {ranks}, seed {self.seed}"
        if self.passed:
            headline = f"SURVIVES: {headline}: every trial ended as the run that was left alone."
        else:
            failed = f"{sum(not trial.passed for trial in self.trials)} of {len(self.trials)}"
            headline = f"DOES NOT SURVIVE: {headline}: {failed} trials ended otherwise."
        rows = [(_row(trial), trial.passed) for trial in self.trials]
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
        advice = [fill(_ADVICE)] if any(trial.differences for trial in self.trials) else []
        notes = [fill(f"Note: {note}") for note in self.notes]
        paragraphs = [*parts.values(), *advice, *notes]
        return TrialReport(headline, self.passed, _COLUMNS, rows, paragraphs)

    def __str__(self) -> str:
        return str(self.report)


def _row(trial: TrialResult) -> tuple[str, ...]:
    went_on = ", ".join(map(str, trial.went_on_from)) or "(nowhere)"
    result = "never ended" if trial.failure else "equal"
    if trial.differences:
        first = trial.differences[0]
        verb = "differ" if first.what == "samples" else "differs"
        when = "the end" if first.step == float("inf") else f"step {first.step:g}"
        result = f"{first.name} {verb} at {when}"
    return trial.done, str(trial.at), went_on, result


def _differing(where: str, differences: tuple[Difference, ...]) -> str:
    """Returns what differs in a trial: of each figure and tensor, where it does so first."""
    firsts: dict[tuple[str, str], Difference] = {}
    for one in differences:
        firsts.setdefault((one.what, one.name), one)
    first, *others = (fill(one.words, "  ") for one in firsts.values())
    then = ["Then:", *and_more(others, _SHOWN)] if others else []
    return "\n".join([f"First difference ({where}):", first, *then])
