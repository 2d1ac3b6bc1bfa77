"""The check: the truth, the other runs, and experiments where numbers part."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dtrain.errors import CheckError
from dtrain.trials import check_causes
from dtrain.trials.check_compare import DOUBLE, SINGLE, Comparison, Results, Tolerance, compare
from dtrain.trials.check_trial import Setup
from dtrain.trials.commands import SWITCHES
from dtrain.trials.launcher import Launcher, last_line
from dtrain.trials.report import Cause, Equivalence


@dataclass(frozen=True, slots=True)
class _Run:
    setup: Setup
    results: Results
    comparison: Comparison


@dataclass
class Check:
    """One check, from the truth to the causes; :func:`dtrain.check_equivalence` says what of."""

    launcher: Launcher
    script: str | Path
    args: Sequence[str]
    ranks: int
    steps: int
    timeout_s: float = 300.0
    allow: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    tolerance: Tolerance = DOUBLE

    def run(self, micro_batches: Sequence[int]) -> Equivalence:
        """Runs it. Ranks: none; the launcher starts them."""
        setup, truth = self._truth()
        batch_size = truth.main.batch_size
        if batch_size is None:
            raise CheckError(
                f"{self.script} trains on an iterable of ready batches, of which each rank has its "
                "own: on other ranks or micro-batches a step sees other samples, and there is "
                "nothing to compare. For this check, give fit a map-style dataset of some samples, "
                "with batch_size."
            )
        setup = replace(setup, examine=False)
        runs = []
        for ranks in sorted({1, self.ranks}):
            for micros in sorted({1, *micro_batches} - ({1} if ranks == 1 else set())):
                one = replace(setup, ranks=ranks, micro_batches=micros, batch_size=batch_size)
                results = self._launch(one, one.title)
                runs.append(_Run(one, results, compare(one.title, truth, results, self.tolerance)))
                results.forget_gradients()
        parted = [run for run in runs if not run.comparison.equal]
        causes = self._causes(setup, truth, parted) if parted else []
        self._take_notes(truth, runs)
        # Where a run parts, a small gradient may move parameters for that reason.
        equal = [run.comparison for run in runs if run.comparison.equal]
        zero = dict.fromkeys(name for one in equal for name in one.zero_gradients)
        dtype = "float64" if self.tolerance is DOUBLE else "float32"
        found = tuple(run.comparison for run in runs)
        told = tuple(causes), tuple(zero), tuple(self.notes)
        return Equivalence(str(self.script), truth.main.steps, dtype, found, *told)

    def _truth(self) -> tuple[Setup, Results]:
        """Runs on one rank with one micro-batch; in float64 if the script can do it."""
        setup = Setup(1, 1, self.steps, without=self.allow, examine=True)
        title, why = f"{setup.title} (the truth)", ""
        try:
            truth = self._launch(setup, title)
        except CheckError as error:
            if not error.fails_itself:
                raise
            # It may be float64 that it cannot do; if not, it fails again, in its own way.
            setup = replace(setup, double=False)
            truth = self._launch(setup, f"{title}, in float32")
            failed = f"in float64 the script fails ({last_line(error)})"
            why = f"{failed}, so it was compared in float32, where"
        if setup.double and truth.main.dtype != "float64":
            came = f"the loss comes in {truth.main.dtype}"
            why = f"{came}, though its batch and the model are float64, so"
        if why:
            self.tolerance = SINGLE
            self.notes.append(
                f"{why} faults of less than a thousandth cannot be told from rounding."
            )
        return setup, truth

    def _launch(self, setup: Setup, title: str) -> Results:
        self.launcher.say(title)
        launch = self.launcher.launch(setup, setup.ranks, self.script, self.args, self.timeout_s)
        several = setup.ranks > 1 or setup.micro_batches > 1
        launch.insist(f"on {setup.title}" if several else "on one rank")
        return Results.read(launch.folder, setup.ranks)

    def _experiment(self, setup: Setup, words: str) -> Results | None:
        """Runs one; that it fails must not hide what is known already."""
        try:
            return self._launch(setup, f"experiment: {words}")
        except CheckError as error:
            self.notes.append(f"an experiment ({words}) failed: {last_line(error)}.")
            return None

    def _causes(self, setup: Setup, truth: Results, parted: list[_Run]) -> list[Cause]:
        worst = parted[-1]  # most ranks, most micro-batches: whatever splits does so here
        suspects = [name for name in truth.main.seen if name not in self.allow]
        if truth.main.data_draws and "augmentation" not in self.allow:
            suspects.append("augmentation")
        equal = self._equal_without(suspects, setup, worst.setup) if suspects else None
        switchable = check_causes.switchable(suspects, equal)
        if equal:
            return switchable
        twins = None
        if several := [run.setup for run in parted if run.setup.ranks > 1]:
            same = replace(several[0], micro_batches=1, twins=True)
            twins = self._experiment(same, f"the same samples on {self.ranks} ranks")
        found = (
            list(check_causes.sure(truth, worst.results, twins, worst.comparison, self.tolerance))
            or list(check_causes.possible(truth.main))[:1]
        )
        if not found or check_causes.other_start(truth, worst.results):
            results = self._experiment(setup, "one rank once more")
            again = results and compare(setup.title, truth, results, self.tolerance)
            if again and not again.equal:
                gaps = {"loss": again.loss_gap, "worst": again.worst, "gap": again.worst_gap}
                found.append(check_causes.cause("a training that does not repeat", **gaps))
        if not found and not (suspects and equal is None):
            found.append(check_causes.cause("not found"))
        return [*found, *switchable]

    def _equal_without(self, suspects: Sequence[str], setup: Setup, worst: Setup) -> bool | None:
        """Tells whether numbers are equal once the suspects are switched off; None if untold."""
        without = (*self.allow, *suspects)
        words = "without " + ", ".join(suspects)
        truth = self._experiment(replace(setup, without=without), f"{words}, {setup.title}")
        run = truth and self._experiment(replace(worst, without=without), f"{words}, {worst.title}")
        if truth is None or run is None:
            return None
        return compare(words, truth, run, self.tolerance).equal

    def _take_notes(self, truth: Results, runs: list[_Run]) -> None:
        self.notes += [f"{SWITCHES[name]} in all runs (--allow {name})." for name in self.allow]
        several = next((run.results for run in runs if run.setup.ranks > 1), None)
        if several is not None:
            models = [rank.given_model for rank in several.ranks]
            unequal = [str(rank) for rank, model in enumerate(models) if model != models[0]]
            if unequal and not check_causes.other_start(truth, several):
                self.notes.append(
                    f"the script makes another model on rank {', '.join(unequal)} than on rank 0: "
                    "its seed depends on the rank. The Trainer gives all ranks rank 0's, so the "
                    "numbers do not suffer; but call dtrain.init(seed=...) before the model is "
                    "made, and seed nothing by the rank."
                )
            mine, theirs = truth.main.batch_size, several.main.batch_size
            if mine != theirs:
                self.notes.append(
                    f"the script asks for batch_size {mine} on one rank and {theirs} on "
                    f"{self.ranks}. batch_size is the global batch; here all runs had {mine}."
                )
        if truth.main.steps < self.steps:
            self.notes.append(f"the training was over after {truth.main.steps} steps.")
        if not all(map(math.isfinite, truth.main.losses)):
            self.notes.append("the loss is not finite, also on one rank with one micro-batch.")
        if any(not run.comparison.equal for run in runs):
            self.notes += [f"could not be looked at: {what}." for what in truth.main.failures]
