"""The check: the truth, the other runs, and experiments where numbers part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dtrain.errors import CheckError, ConfigError
from dtrain.trials import check_causes as find
from dtrain.trials.check_compare import DOUBLE, SINGLE, Comparison, Tolerance, compare
from dtrain.trials.check_record import Examined, Results
from dtrain.trials.check_report import Cause, Equivalence
from dtrain.trials.check_trial import SWITCHES, Setup
from dtrain.trials.launcher import Launcher, check_script, last_line

Progress = Callable[[str], None]


def check_equivalence(
    script: str | Path,
    args: Sequence[str] = (),
    *,
    ranks: int = 2,
    micro_batches: Sequence[int] = (1, 2),
    steps: int = 4,
    timeout_s: float = 300.0,
    allow: Sequence[str] = (),
    progress: Progress | None = None,
) -> Equivalence:
    """Trains a few steps of a script on 1 and on several ranks, and compares all numbers.

    The script runs as it is, in processes of its own, up to the end of its first ``fit``. There
    it takes ``steps`` steps in float64, without checkpoints, sinks, evaluation and mixed
    precision, with its global batch split over ranks and micro-batches in every combination.
    Where numbers part from those of one rank with one micro-batch, experiments look for the
    cause.

    Example::

        found = dtrain.check_equivalence("train.py", ["--size", "tiny"])
        assert found.passed, str(found)

    Args:
        script: a file that calls ``Trainer(...).fit(...)``.
        args: the script's own arguments.
        ranks: compare one rank with so many. They run on this machine: on its GPUs if there is
            one for each, else on the CPU.
        micro_batches: compare so many micro-batches a rank.
        steps: global steps of each run.
        timeout_s: how long a run may take, in seconds.
        allow: what may make numbers depend on ranks, and is taken out of all runs, so that the
            rest can be compared: ``"dropout"``, ``"batchnorm"``, ``"augmentation"``,
            ``"mixup"``.
        progress: is told what runs next.

    Returns:
        What was found; ``str()`` of it is a report.

    Raises:
        ConfigError: an argument is off.
        CheckError: the script failed, took too long, or never called ``fit``.

    Ranks: none; it starts them.
    """
    script = Path(script)
    check_script(script, timeout_s)
    if min(ranks, steps, *micro_batches) < 1:
        raise ConfigError(
            f"ranks={ranks}, steps={steps}, micro_batches={list(micro_batches)}: all must be 1 or "
            "more"
        )
    if ranks == 1 and not any(micros > 1 for micros in micro_batches):
        raise ConfigError(
            "nothing to compare: with one rank and one micro-batch there is the truth only. Ask "
            "for ranks=2, or micro_batches=(1, 2)"
        )
    for name in allow:
        if name not in SWITCHES:
            raise ConfigError(f"allow={name!r}: choose from {', '.join(SWITCHES)}")
    with Launcher(most_ranks=ranks) as launcher:
        check = Check(launcher, script, args, ranks, steps, timeout_s, tuple(allow), progress)
        return check.run(micro_batches)


@dataclass(frozen=True, slots=True)
class _Run:
    setup: Setup
    results: Results
    comparison: Comparison


@dataclass
class Check:
    """One check, from the truth to the causes; :func:`check_equivalence` says what of."""

    launcher: Launcher
    script: str | Path
    args: Sequence[str]
    ranks: int
    steps: int
    timeout_s: float = 300.0
    allow: tuple[str, ...] = ()
    progress: Progress | None = None
    notes: list[str] = field(default_factory=list)
    tolerance: Tolerance = DOUBLE

    def run(self, micro_batches: Sequence[int]) -> Equivalence:
        """Runs it.

        Ranks: none; the launcher starts them.
        """
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
                runs.append(_Run(one, results, self._compare(one.title, truth, results)))
                results.forget_gradients()
        parted = [run for run in runs if not run.comparison.equal]
        causes = self._causes(setup, truth, parted) if parted else []
        self._take_notes(truth, runs)
        # Where a run parts, a small gradient may move parameters for that reason.
        equal = [run.comparison for run in runs if run.comparison.equal]
        zero = dict.fromkeys(name for one in equal for name in one.zero_gradients)
        return Equivalence(
            script=str(self.script),
            steps=truth.main.steps,
            dtype="float64" if self.tolerance is DOUBLE else "float32",
            runs=tuple(run.comparison for run in runs),
            causes=tuple(causes),
            zero_gradients=tuple(zero),
            notes=tuple(self.notes),
        )

    # -- runs ---------------------------------------------------------------------------------

    def _truth(self) -> tuple[Setup, Results]:
        """One rank and one micro-batch; in float64 if the script can do it."""
        setup = Setup(1, 1, self.steps, without=self.allow, examine=True)
        try:
            truth = self._launch(setup, f"{setup.title} (the truth)")
        except CheckError as error:
            if not error.fails_itself:
                raise
            # It may be float64 that it cannot do; if not, it fails again, in its own way.
            setup = replace(setup, double=False)
            truth = self._launch(setup, f"{setup.title} (the truth), in float32")
            self._compare_in_single(
                f"in float64 the script fails ({last_line(error)}), so it was compared in float32, "
                "where"
            )
        if setup.double and truth.main.dtype != "float64":
            self._compare_in_single(
                f"the loss comes in {truth.main.dtype}, though its batch and the model are "
                "float64, so"
            )
        return setup, truth

    def _compare_in_single(self, why: str) -> None:
        self.notes.append(f"{why} faults of less than a thousandth cannot be told from rounding.")
        self.tolerance = SINGLE

    def _launch(self, setup: Setup, title: str) -> Results:
        if self.progress is not None:
            self.progress(title)
        trial, text = "dtrain.trials.check_trial", setup.to_json()
        launch = self.launcher.launch(
            trial, text, setup.ranks, self.script, self.args, self.timeout_s
        )
        several = setup.ranks > 1 or setup.micro_batches > 1
        launch.insist(f"on {setup.title}" if several else "on one rank")
        return Results.read(launch.folder, setup.ranks)

    def _compare(self, title: str, truth: Results, results: Results) -> Comparison:
        return compare(title, truth, results, self.tolerance)

    # -- causes -------------------------------------------------------------------------------

    def _causes(self, setup: Setup, truth: Results, parted: list[_Run]) -> list[Cause]:
        worst = parted[-1]  # most ranks, most micro-batches: whatever splits does so here
        title, results = worst.comparison.title, worst.results
        examined = truth.main.examined or Examined()
        suspects = [name for name in truth.main.seen if name not in self.allow]
        if examined.data_draws and "augmentation" not in self.allow:
            suspects.append("augmentation")
        equal = self._equal_without(suspects, setup, worst.setup) if suspects else None
        causes = find.switchable(suspects, equal)
        if equal:
            return causes
        start = find.other_start(truth, results, title)
        found = _those_of(
            find.drifting(worst.comparison.strays, title),
            find.ragged_mean(examined, self.tolerance),
            *self._rank_dependent(parted, examined),
            start,
            find.other_settings(truth.main, results.main, title),
        )
        if not found:
            # What only may be a cause, or follows from one that was found: the first of them.
            found = _those_of(
                find.wandering_data(examined),
                find.random_loss(examined),
                find.moving_buffers(truth.main),
            )[:1]
        if not found or start is not None:
            found += self._again(setup, truth)
        if not found and not (suspects and equal is None):
            found.append(find.unknown())
        return [*found, *causes]

    def _equal_without(self, suspects: Sequence[str], setup: Setup, worst: Setup) -> bool | None:
        """An experiment: are the numbers equal once the suspects are switched off?"""
        without = (*self.allow, *suspects)
        words = "without " + ", ".join(suspects)
        truth = self._experiment(replace(setup, without=without), f"{words}, {setup.title}")
        run = truth and self._experiment(replace(worst, without=without), f"{words}, {worst.title}")
        return None if truth is None or run is None else self._compare(words, truth, run).equal

    def _rank_dependent(self, parted: list[_Run], examined: Examined) -> list[Cause | None]:
        """An experiment: every rank gets the same samples and random streams."""
        several = [run.setup for run in parted if run.setup.ranks > 1]
        if not several:
            return []
        setup = replace(several[0], micro_batches=1, twins=True)
        twins = self._experiment(setup, f"the same samples on {self.ranks} ranks")
        if twins is None:
            return []
        return [find.rank_in_data(twins), find.rank_in_loss(twins, examined.draws)]

    def _again(self, setup: Setup, truth: Results) -> list[Cause]:
        """An experiment: does the truth repeat itself?"""
        results = self._experiment(setup, "one rank once more")
        if results is None:
            return []
        again = self._compare(setup.title, truth, results)
        if again.equal:
            return []
        where = f"loss by {again.loss_gap:.1e}, {again.worst} by {again.worst_gap:.1e}"
        return [find.not_repeatable(where)]

    def _experiment(self, setup: Setup, words: str) -> Results | None:
        """Runs one; that it fails must not hide what is known already."""
        try:
            return self._launch(setup, f"experiment: {words}")
        except CheckError as error:
            self.notes.append(f"an experiment ({words}) failed: {last_line(error)}.")
            return None

    # -- notes --------------------------------------------------------------------------------

    def _take_notes(self, truth: Results, runs: list[_Run]) -> None:
        self.notes += [f"{SWITCHES[name]} in all runs (--allow {name})." for name in self.allow]
        several = [run.results for run in runs if run.setup.ranks > 1]
        if several:
            self._note_several(truth, several[0])
        if truth.main.steps < self.steps:
            self.notes.append(f"the training was over after {truth.main.steps} steps.")
        if not all(map(math.isfinite, truth.main.losses)):
            self.notes.append("the loss is not finite, also on one rank with one micro-batch.")
        examined = truth.main.examined
        if examined is not None and any(not run.comparison.equal for run in runs):
            self.notes += [f"could not be looked at: {failure}." for failure in examined.failures]

    def _note_several(self, truth: Results, run: Results) -> None:
        models = [rank.given_model for rank in run.ranks]
        unequal = [str(rank) for rank, model in enumerate(models) if model != models[0]]
        if unequal and find.other_start(truth, run, "") is None:
            which = ", ".join(unequal)
            self.notes.append(
                f"the script makes another model on rank {which} than on rank 0: its seed depends "
                "on the rank. The Trainer gives all ranks rank 0's, so the numbers do not suffer; "
                "but call dtrain.init(seed=...) before the model is made, and seed nothing by the "
                "rank."
            )
        mine, theirs = truth.main.batch_size, run.main.batch_size
        if mine != theirs:
            self.notes.append(
                f"the script asks for batch_size {mine} on one rank and {theirs} on {self.ranks}. "
                f"batch_size is the global batch; here all runs had {mine}."
            )


def _those_of(*causes: Cause | None) -> list[Cause]:
    return [cause for cause in causes if cause is not None]
