"""The drill: two runs that are left alone, then trials, each disturbed and started again."""

import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dtrain.errors import CheckError
from dtrain.trials.drill_compare import (
    Difference,
    DrilledRun,
    LastCheckpoint,
    StartRecord,
    compare,
    compare_resized,
    tolerance_of,
)
from dtrain.trials.drill_trial import Disturbance, Start, draw
from dtrain.trials.launcher import Launch, Launcher
from dtrain.trials.report import Drilled, TrialResult, plural

_MOST_STARTS = 4  # of a trial: one is disturbed; a script may leave once more by itself


@dataclass
class Drill:
    """One drill of a script; :func:`drill_script` says what of."""

    launcher: Launcher
    script: str | Path
    args: Sequence[str]
    ranks: int
    steps: int
    seed: int = 0
    timeout_s: float = 300.0
    notes: list[str] = field(default_factory=list)
    #: Figures and states that no two runs have in common, such as seconds.
    restless: set[tuple[str, str]] = field(default_factory=set)

    def run(self, *, kills: int, other_ranks: int | None = None) -> Drilled:
        """Runs it. Ranks: none; the launcher starts them."""
        reference = self._undisturbed("undisturbed", first=True)
        if other_ranks is not None and reference.starts[0].main.facts["stream"]:
            raise CheckError(
                f"{self.script} trains on an iterable of ready batches, of which each rank has its "
                "own: with other ranks its steps are others, and there is nothing to compare. "
                "Leave out --other-ranks, or give fit a map-style dataset with batch_size."
            )
        self._check_repeats(reference, self._undisturbed("undisturbed, once more"))
        steps = len(reference.starts[0].batches())
        run = {"ranks": self.ranks, "steps": steps, "save_every": self._save_every}
        drawn = draw(kills=kills, seed=self.seed, **run)
        trials = [self._trial(reference, one, self.ranks) for one in drawn]
        if other_ranks is not None:
            disturbance = replace(drawn[0], kind="kill all", rank=0)
            trials.append(self._trial(reference, disturbance, other_ranks))
            self.notes.append(
                f"where it went on with {plural(other_ranks, 'rank')}, global batches were "
                "compared sample by sample, and parameters and buffers within law 1's tolerance: "
                f"{tolerance_of(reference.final.model):g} of their norm."
            )
        found = tuple(trials), tuple(self.notes)
        return Drilled(str(self.script), self.ranks, steps, self.seed, *found)

    @property
    def _save_every(self) -> int:
        return max(1, self.steps // 5)

    def _undisturbed(self, words: str, *, first: bool = False) -> DrilledRun:
        self.launcher.say(words)
        start = self._new_start(None)
        launch, record = self._launch(start, self.ranks)
        where = "undisturbed" if first else "undisturbed, when it was started a second time"
        launch.insist(f"on {self.ranks} ranks, {where}" if self.ranks > 1 else where)
        if first:
            self._check_facts(record.main.facts)
        if not record.finished:
            raise CheckError(
                f"{self.script} was left alone and was preempted all the same: a signal, a time "
                f"limit or a callback ended it before {self.steps} steps. Drill it without that."
            )
        done = len(record.batches())
        if done < 3:
            raise CheckError(
                f"{self.script} trains for {done} steps only, which leaves no room to save, be "
                "killed and go on: let it take 3 or more."
            )
        return DrilledRun((record,), LastCheckpoint.read(Path(start.run_dir)))

    def _check_facts(self, facts: dict[str, bool]) -> None:
        if not facts["run_dir"]:
            raise CheckError(
                f"{self.script} gives its Trainer no run_dir, so nothing of a run is left once it "
                "is killed, and there is nothing to drill. Pass Trainer(..., run_dir='runs/...', "
                "callbacks=[Checkpoint(every_steps=...)])."
            )
        if not facts["checkpoint"]:
            self.notes.append(
                f"{self.script} has no Checkpoint among its callbacks, so a kill costs it the "
                "whole run. The drill added Checkpoint(every_steps=...): add one to the script."
            )
        if facts["never_resumes"]:
            self.notes.append(
                f"{self.script} passes resume='never', so each start begins anew, and a kill costs "
                "the whole run. Leave resume away, and it goes on."
            )

    def _check_repeats(self, reference: DrilledRun, again: DrilledRun) -> None:
        """Finds what no two runs have in common; a training that does not repeat is refused."""
        found = compare(reference, again)
        for one in found:
            if one.what in ("samples", "model") or one.name.startswith("optimizer/"):
                words = one.words.replace(" already before the kill", "")
                raise CheckError(
                    f"{self.script} does not repeat itself, even undisturbed, so what a kill does "
                    f"to it cannot be told. The second of two equal runs: {words}. Call "
                    "dtrain.init(seed=...) before the model is made, seed every generator of your "
                    "own, and take no seed from the time."
                )
        self.restless = {(one.what, one.name) for one in found}
        if self.restless:
            names = ", ".join(sorted(name for _, name in self.restless))
            self.notes.append(f"not compared, because it differs in any two runs: {names}.")

    def _trial(self, reference: DrilledRun, disturbance: Disturbance, ranks: int) -> TrialResult:
        """Disturbs a run, and starts it again until it ends, on so many ranks."""
        resized = ranks != self.ranks
        then = plural(ranks, "rank") if resized else ""
        done = disturbance.words(self.ranks)
        words = f"{done}{then and f', then {then}'} at step {disturbance.step}"
        self.launcher.say(words)
        start = self._new_start(disturbance)
        starts, failure = self._to_its_end(start, ranks)
        if not failure and not starts[0].disturbed:
            raise CheckError(
                f"{self.script} came to its end and never to the place for '{words}': it takes "
                "other steps from run to run, or ends by itself at another one."
            )
        found: list[Difference] = []
        if not failure:
            try:
                run = DrilledRun(starts, LastCheckpoint.read(Path(start.run_dir)))
                found = (compare_resized if resized else compare)(reference, run)
            except CheckError as error:
                failure = f"  {error}"
        done = (starts[0].disturbed or done) + (then and f"; then {then}")
        began = tuple(one.main.began_at for one in starts[1:] if one.main.began_at is not None)
        found = [one for one in found if (one.what, one.name) not in self.restless]
        return TrialResult(done, disturbance.step, began, tuple(found), failure)

    def _to_its_end(self, start: Start, ranks: int) -> tuple[tuple[StartRecord, ...], str]:
        """Returns what each start left, and why the run never came to its end, if it did not."""
        starts: tuple[StartRecord, ...] = ()
        size = self.ranks
        for number in range(_MOST_STARTS):
            launch, record = self._launch(start, size)
            starts += (record,)
            if launch.late:
                took = f"  it took longer than {self.timeout_s:g} seconds (--timeout)"
                return starts, f"{took}. Where it was:\n{launch.stuck()}"
            if record.finished and not launch.failed:
                return starts, ""
            if not (record.disturbed or record.preempted):
                again = "when started again " if number else ""
                return starts, _why(launch, f"{again}on {plural(size, 'rank')}")
            start, size = replace(start, disturbance=None), ranks
        return starts, f"  it was started {_MOST_STARTS} times, and left each time"

    def _launch(self, start: Start, ranks: int) -> tuple[Launch, StartRecord]:
        launch = self.launcher.launch(start, ranks, self.script, self.args, self.timeout_s)
        return launch, StartRecord.read(launch.folder, ranks)

    def _new_start(self, disturbance: Disturbance | None) -> Start:
        folder = Path(tempfile.mkdtemp(prefix="trained-", dir=self.launcher.folder))
        return Start(str(folder / "run"), self.steps, self._save_every, disturbance)


def _why(launch: Launch, where: str) -> str:
    try:
        launch.insist(where)
    except CheckError as error:
        return textwrap.indent(str(error), "  ")
    return "  it ended before the training did"
