"""The drill: two runs that are left alone, then trials, each struck and started again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dtrain.errors import CheckError, ConfigError
from dtrain.trials.drill.compare import Difference, compare, compare_resized, tolerance_of
from dtrain.trials.drill.orders import Fault, Start
from dtrain.trials.drill.plan import draw
from dtrain.trials.drill.record import StartRecord
from dtrain.trials.drill.report import Drilled, Trial
from dtrain.trials.drill.run import Final, Run
from dtrain.trials.equivalence.launcher import Launch, Launcher

Progress = Callable[[str], None]

_RUNNER = "dtrain.trials.drill.probe"
_MOST_STARTS = 4  # of a trial: one is struck; a script may leave once more by itself


def drill(
    script: str | Path,
    args: Sequence[str] = (),
    *,
    ranks: int = 2,
    kills: int = 3,
    steps: int = 20,
    seed: int = 0,
    timeout_s: float = 300.0,
    other_ranks: int | None = None,
    progress: Progress | None = None,
) -> Drilled:
    """Kills a script's training again and again, and compares how it ends.

    The script runs as it is, in processes of its own, up to the end of its first ``fit``.

    Args:
        script: a file that calls ``Trainer(...).fit(...)``.
        args: the script's own arguments.
        ranks: on how many. They run on this machine: on its GPUs if there is one for each, else
            on the CPU.
        kills: how many kills in a step; half as many more fall on a save, and one rank is
            preempted.
        steps: global steps of each run, at most.
        seed: of the steps, ranks and moments of all that is done.
        timeout_s: how long one start may take, in seconds.
        other_ranks: in one more trial, go on with so many ranks.
        progress: is told what runs next.

    Returns:
        What was found; ``str()`` of it is a report.

    Raises:
        ConfigError: an argument is off.
        CheckError: the script cannot be drilled; the message says why.

    Ranks: none; it starts them.
    """
    _check_arguments(Path(script), ranks, kills, steps, timeout_s, other_ranks)
    with Launcher(most_ranks=max(ranks, other_ranks or 1), command="drill") as launcher:
        return Drill(launcher, Path(script), args, ranks, steps, seed, timeout_s, progress).run(
            kills=kills, other_ranks=other_ranks
        )


def _check_arguments(
    script: Path, ranks: int, kills: int, steps: int, timeout_s: float, other_ranks: int | None
) -> None:
    if not script.is_file():
        raise ConfigError(f"there is no script {str(script)!r} (seen from {Path.cwd()})")
    if min(ranks, kills) < 1 or (other_ranks is not None and other_ranks < 1):
        other = "" if other_ranks is None else f", other_ranks={other_ranks}"
        raise ConfigError(f"ranks={ranks}, kills={kills}{other}: all must be 1 or more")
    if steps < 3:
        raise ConfigError(f"steps={steps}: must be 3 or more, to save, be killed and go on")
    if timeout_s <= 0:
        raise ConfigError(f"timeout_s={timeout_s}: must be more than 0 seconds")
    if other_ranks == ranks:
        raise ConfigError(
            f"other_ranks={other_ranks} is the number of ranks of all other trials: ask for another"
        )


class _NeverEnded(Exception):
    """A run that was struck did not come to its end; the message says why."""


@dataclass
class Drill:
    """One drill of a script; :func:`drill` says what of."""

    launcher: Launcher
    script: str | Path
    args: Sequence[str]
    ranks: int
    steps: int
    seed: int = 0
    timeout_s: float = 300.0
    progress: Progress | None = None
    notes: list[str] = field(default_factory=list)
    #: Figures and states that no two runs have in common, such as seconds.
    restless: set[tuple[str, str]] = field(default_factory=set)

    def run(self, *, kills: int, other_ranks: int | None = None) -> Drilled:
        """Runs it.

        Raises:
            CheckError: the script cannot be drilled.

        Ranks: none; the launcher starts them.
        """
        save_every = max(1, self.steps // 5)
        reference = self._undisturbed("undisturbed", save_every, first=True)
        if other_ranks is not None and reference.starts[0].main.facts["stream"]:
            raise CheckError(
                f"{self.script} trains on an iterable of ready batches, of which each rank has its "
                "own: with other ranks its steps are others, and there is nothing to compare. "
                "Leave out --other-ranks, or give fit a map-style dataset with batch_size."
            )
        self._repeats(reference, self._undisturbed("undisturbed, once more", save_every))
        steps = len(reference.starts[0].batches())
        faults = draw(
            kills=kills, ranks=self.ranks, steps=steps, save_every=save_every, seed=self.seed
        )
        trials = [self._trial(reference, fault, save_every, self.ranks) for fault in faults]
        if other_ranks is not None:
            fault = replace(faults[0], kind="kill all", rank=0)
            trials.append(self._trial(reference, fault, save_every, other_ranks))
            tolerance = tolerance_of(reference.final.model)
            self.notes.append(
                f"where it went on with {_ranks(other_ranks)}, global batches were compared "
                "sample by sample, and parameters and buffers within law 1's tolerance: "
                f"{tolerance:g} of their norm."
            )
        return Drilled(
            str(self.script), self.ranks, steps, self.seed, tuple(trials), tuple(self.notes)
        )

    # -- runs that are left alone -------------------------------------------------------------

    def _undisturbed(self, words: str, save_every: int, *, first: bool = False) -> Run:
        self._say(words)
        start = Start(self._new_run_dir(), self.steps, save_every)
        launch, record = self._start(start, self.ranks)
        where = "undisturbed" if first else "undisturbed, when it was started a second time"
        self.launcher.insist(launch, f"on {self.ranks} ranks, {where}" if self.ranks > 1 else where)
        if first:
            self._check_facts(record)
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
        return Run((record,), Final.read(Path(start.run_dir)))

    def _check_facts(self, record: StartRecord) -> None:
        facts = record.main.facts
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

    def _repeats(self, reference: Run, again: Run) -> None:
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

    # -- trials -------------------------------------------------------------------------------

    def _trial(self, reference: Run, fault: Fault, save_every: int, ranks: int) -> Trial:
        """Strikes a run, and starts it again until it ends; ``ranks`` of them after the first."""
        resized = ranks != self.ranks
        words = _words(fault, self.ranks) + (f", then {_ranks(ranks)}" if resized else "")
        start = Start(self._new_run_dir(), self.steps, save_every, fault)
        starts: list[StartRecord] = []
        failure = ""
        differences: list[Difference] = []
        try:
            final = self._to_its_end(start, ranks, f"{words} at step {fault.step}", starts)
        except _NeverEnded as error:
            failure = str(error)
        else:
            compared = compare_resized if resized else compare
            differences = compared(reference, Run(tuple(starts), final))
        done = (starts[0].struck or words) + (f"; then {_ranks(ranks)}" if resized else "")
        return Trial(
            done,
            fault.step,
            tuple(one.main.began_at for one in starts[1:] if one.main.began_at is not None),
            tuple(one for one in differences if (one.what, one.name) not in self.restless),
            failure,
        )

    def _to_its_end(self, start: Start, ranks: int, words: str, starts: list[StartRecord]) -> Final:
        size = self.ranks
        self._say(words)
        while True:
            launch, record = self._start(start, size)
            starts.append(record)
            if launch.late:
                raise _NeverEnded(
                    f"  it took longer than {self.timeout_s:g} seconds (--timeout). Where it was:\n"
                    f"{launch.stuck()}"
                )
            if record.finished and not launch.failed:
                break
            if not (record.struck or record.preempted):
                raise _NeverEnded(self._failed(launch, size, again=len(starts) > 1))
            if len(starts) == _MOST_STARTS:
                raise _NeverEnded(f"  it was started {_MOST_STARTS} times, and left each time")
            start, size = replace(start, fault=None), ranks
        if not starts[0].struck:
            raise CheckError(
                f"{self.script} came to its end and never to the place for '{words}': it takes "
                "other steps from run to run, or ends by itself at another one."
            )
        try:
            return Final.read(Path(start.run_dir))
        except CheckError as error:
            raise _NeverEnded(f"  {error}") from error

    def _failed(self, launch: Launch, ranks: int, *, again: bool) -> str:
        where = f"on {_ranks(ranks)}"
        try:
            self.launcher.insist(launch, f"when started again {where}" if again else where)
        except CheckError as error:
            return "\n".join(f"  {line}" for line in str(error).splitlines())
        return "  it ended before the training did"

    # -- starts -------------------------------------------------------------------------------

    def _start(self, start: Start, ranks: int) -> tuple[Launch, StartRecord]:
        launch = self.launcher.launch(
            _RUNNER, start.to_json(), ranks, self.script, self.args, self.timeout_s
        )
        return launch, StartRecord.read(launch.folder, ranks)

    def _new_run_dir(self) -> str:
        number = len(list(self.launcher.folder.glob("trained-*")))
        folder = self.launcher.folder / f"trained-{number}"
        folder.mkdir()
        return str(folder / "run")

    def _say(self, words: str) -> None:
        if self.progress is not None:
            self.progress(words)


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


def _words(fault: Fault, ranks: int) -> str:
    if fault.kind == "kill all":
        return "kill -9 of all ranks" if ranks > 1 else "kill -9"
    if fault.kind == "kill one":
        return f"kill -9 of rank {fault.rank}"
    if fault.kind in ("kill writing", "kill renaming"):
        return "kill -9 within a save"
    return f"SIGTERM to rank {fault.rank}"
