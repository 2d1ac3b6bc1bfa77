"""A study: a script's training as it is and with changes, on several seeds, and what that shows."""

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from dtrain.cluster import tasks_in_queue
from dtrain.errors import CheckError, ConfigError
from dtrain.studies import Pick, Table, check_metric, guess_mode, make_ready, make_table
from dtrain.trials import study_files as files
from dtrain.trials.changes import BASE, Variant, plan_variants
from dtrain.trials.launcher import Launch, Launcher, Progress, last_line
from dtrain.trials.study_files import StudyFolder, StudyNote

NO_LIMIT_S = 1e6  # eleven days: systems count milliseconds in 32 bits
Due = tuple[str, int]  # a variant and a seed


@dataclass
class StudyRunner:
    """Plans a study, runs what of it is not done, and collects. Ranks: none; it starts them.

    When it is left, all that it started is stopped.
    """

    script: Path
    args: list[str]
    folder: StudyFolder
    jobs: int
    ranks: int
    timeout_s: float
    retry: bool  # runs that have failed, too
    progress: Progress
    elsewhere: bool = False  # the runs are not on this machine
    note: StudyNote = field(init=False)
    _launchers: list[Launcher] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)  # which stops them

    # -- what is to be done ---------------------------------------------------------------------

    def _begin(self) -> None:
        """Takes up the study in the folder, or begins one; ConfigError where that is another."""
        threads = max(1, len(os.sched_getaffinity(0)) // (self.jobs * self.ranks))
        digest = files.digest_of_file(self.script)
        new = StudyNote(str(self.script.absolute()), self.args, digest, threads)
        self.note = note = self.folder.read() or new
        if note.format != files.FORMAT:
            raise ConfigError(f"{self.folder.path} is of another version of dtrain")
        words = " ".join([note.script, *note.args])
        if (note.script, note.args) != (new.script, new.args):
            raise ConfigError(
                f"the study in {self.folder.path} is of `{words}`, not of "
                f"`{' '.join([new.script, *new.args])}`: choose another --folder"
            )
        if note.digest != digest:
            raise ConfigError(
                f"{self.script} has changed since the study in {self.folder.path} was begun, so "
                "new runs would not be like the old ones: choose another --folder, or delete this"
            )

    def plan(
        self,
        given: Sequence[Variant],
        seeds: Sequence[int],
        pick: tuple[str | None, str | None, str],
        *,
        each: bool,
        pairs: bool,
        only: bool,
    ) -> list[Due]:
        """Takes up the study, looks at the script, notes what is to be run; returns what is due.

        Raises ConfigError where what is wanted cannot be changed, CheckError where the script fails
        before its first ``fit``.
        """
        self._begin()
        note = self.note
        found = self._probe(given)
        note.callbacks = found["callbacks"]
        variants = plan_variants(given, note.callbacks, each=each, pairs=pairs, only=only)
        known = note.variants
        if known and (known[0].name, set(known[0].changes)) != (
            variants[0].name,
            set(variants[0].changes),
        ):
            raise ConfigError(
                f"the study in {self.folder.path} compares with {known[0].name!r}, and this would "
                f"with {variants[0].name!r}: choose another --folder"
            )
        by_changes = {frozenset(one.changes): one for one in known}
        for one in variants:
            twin = next((k for k in known if k.name == one.name), one)
            if set(twin.changes) != set(one.changes):
                raise ConfigError(
                    f"the study in {self.folder.path} has another variant named {one.name!r}: "
                    "choose another name"
                )
            by_changes.setdefault(frozenset(one.changes), one)
        note.variants = list(by_changes.values())
        if metric_asked := pick[0]:  # before it is noted
            check_asked(self.folder, note, metric_asked, pick[2])
        self._pick(found, *pick)
        wanted = [by_changes[frozenset(one.changes)].name for one in variants]
        planned = [(name, seed) for seed in seeds for name in wanted]
        note.runs += [one for one in planned if one not in note.runs]
        self.folder.write(note)
        queued = {note.runs[task]: job for task, job in tasks_in_queue(note.jobs).items()}
        if queued:
            of = ", ".join(sorted({*queued.values()}))
            self.progress(f"{len(queued)} of its runs are in SLURM's queue already (job {of})")
        return [one for one in planned if one not in queued and self._is_due(*one)]

    def _is_due(self, variant: str, seed: int) -> bool:
        state = self.folder.read_run(variant, seed).state
        return state == "unfinished" or (state == "failed" and self.retry)

    def _probe(self, given: Sequence[Variant]) -> dict[str, Any]:
        """Returns what the script has, having tried whether each change could be made."""
        from dtrain.trials.study_trial import PROBE, Setup

        self.progress("what the script has")
        # With other arguments the script may have other callbacks: such a run looks for itself.
        wanted = [one for variant in given if not variant.arguments for one in variant.overrides]
        setup = Setup(BASE, 0, [], [], wanted=wanted)
        launch = self._launcher(0).launch(setup, self.ranks, self.script, self.args, self.timeout_s)
        launch.insist("before it trained")
        found: dict[str, Any] = json.loads((launch.folder / PROBE).read_bytes())
        if found["refused"]:
            raise ConfigError(found["refused"])
        return found

    def _pick(
        self, found: Mapping[str, Any], metric: str | None, mode: str | None, at: str
    ) -> None:
        """Notes what is compared: what is asked for, else what the script itself judges by."""
        note = self.note
        own = found["best"] or [None, None]
        if metric is None:
            metric = note.metric or own[0] or ("eval/loss" if found["evaluates"] else "train/loss")
        if mode is None:
            mode = note.mode if metric == note.metric else None
        if mode is None:
            mode = own[1] if metric == own[0] else guess_mode(metric)
        note.metric, note.mode, note.at = metric, mode, at
        pick_of(note)  # an unknown one is refused now

    # -- running --------------------------------------------------------------------------------

    def run(self, due: Sequence[Due]) -> None:
        """Runs all that is due, so many at a time. Interrupted, it can be called again.

        Raises CheckError where what is compared with fails at once, ConfigError where no such
        metric comes.
        """
        # Those of the same arguments after one another: a process that has made the script's
        # imports serves them all.
        arguments = [tuple(one.arguments) for one in self.note.variants]
        names = [one.name for one in self.note.variants]
        queue = sorted(due, key=lambda one: arguments.index(arguments[names.index(one[0])]))
        lock, began = threading.Lock(), time.monotonic()
        done = 0

        def work(launcher: Launcher) -> None:
            nonlocal done
            while True:
                with lock:
                    if not queue:
                        return
                    variant, seed = queue.pop(0)
                    number = len(due) - len(queue)
                    took = (time.monotonic() - began) / done * (len(due) - done) if done else 0
                    left = f" (about {_in_words(took)} left)" if took else ""
                    self.progress(f"{number} of {len(due)}: {variant}, seed {seed}{left}")
                try:
                    self._run_one(launcher, variant, seed)
                except BaseException:
                    queue.clear()
                    raise
                with lock:
                    done += 1

        jobs = min(self.jobs, len(due))
        launchers = [self._launcher(number) for number in range(jobs)]
        # What the table and its picture need is imported meanwhile.
        threading.Thread(target=make_ready, daemon=True).start()
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            futures = [pool.submit(work, launcher) for launcher in launchers]
            try:
                ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for one in ended:
                    one.result()
            finally:  # also at Ctrl-C: what runs is killed, and goes on next time
                queue.clear()
                for launcher in launchers:
                    launcher.abandon()

    def _launcher(self, job: int) -> Launcher:
        """Returns a job's, which has imported torch once for all that it starts."""
        while len(self._launchers) <= job:
            variables = self._variables(len(self._launchers))
            self._launchers.append(
                self._stack.enter_context(
                    Launcher(most_ranks=self.ranks, command="ablate", variables=variables)
                )
            )
        return self._launchers[job]

    def __enter__(self) -> "StudyRunner":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _run_one(self, launcher: Launcher, name: str, seed: int) -> None:
        from dtrain.trials.study_trial import Setup

        variant = next(one for one in self.note.variants if one.name == name)
        folder = self.folder.prepare_run(name, seed)
        setup = Setup(name, seed, variant.overrides, [str(one) for one in variant.changes])
        args = [*self.args, *variant.arguments]
        launch = launcher.launch(setup, self.ranks, self.script, args, self.timeout_s, folder)
        note = self.folder.read_run(name, seed)
        error = _what_went_wrong(launch)
        if not (error or note.left):
            error = (
                "the script ended its own process (os._exit), so it is not known whether it had "
                "come to its end: have it return, or call sys.exit"
            )
        if note.state == "unfinished" and error:
            files.fail_run(folder, replace(note, changes=setup.words), error)
            note = self.folder.read_run(name, seed)
        if variant is not self.note.variants[0]:
            return
        if note.state == "failed":
            others = [s for n, s in self.note.runs if n == name and s != seed]
            if not any(self.folder.read_run(name, s).state == "finished" for s in others):
                raise CheckError(
                    f"{self.script} fails as {name!r}, with which all is compared (seed {seed}): "
                    f"{note.error}\n{launch.said()}\nRun again with --retry once it is mended."
                )
        elif note.state == "finished":
            runs = self.folder.runs([(name, seed)])
            check_metric(runs[0], pick_of(self.note))

    def _variables(self, job: int) -> dict[str, str]:
        """Returns what ranks of a job find in their environment: its cores and GPUs."""
        threads = {"OMP_NUM_THREADS": str(self.note.threads)}
        return threads if self.elsewhere else threads | devices_of(job, self.jobs, self.ranks)


def check_asked(folder: StudyFolder, note: StudyNote, metric: str, at: str) -> None:
    """Raises ConfigError where a study has runs to compare with, and these have no such metric."""
    base = note.variants[0].name
    for run in folder.runs(one for one in note.runs if one[0] == base):
        if run.state == "finished":
            check_metric(run, Pick(metric, "min", at))
            return


def pick_of(note: StudyNote) -> Pick:
    """Returns what is compared; ConfigError where it is unknown."""
    return Pick(note.metric, cast(Literal["min", "max"], note.mode), note.at)


def compared(folder: StudyFolder, note: StudyNote) -> Table:
    """Returns what there is of a study so far, compared."""
    near = os.path.relpath(note.script)
    words = " ".join([note.script if near.startswith("..") else near, *note.args])
    order = [one.name for one in note.variants]
    table = make_table(
        folder.runs(note.runs), pick_of(note), base=order[0], order=order, title=words
    )
    return replace(table, notes=[*table.notes, *_notes(folder, note)])


def _notes(folder: StudyFolder, note: StudyNote) -> list[str]:
    """Says what else of the runs a reader of their table must know; each thing once."""
    found: dict[str, None] = {}
    for one in note.runs:
        run = folder.read_run(*one)
        if run.fits > 1:
            found[
                f"{Path(note.script).name} calls fit {run.fits} times: what is compared is of the "
                "last" + (f" ({run.place})" if run.place else "")
            ] = None
        found |= dict.fromkeys(f"{run.variant}, seed {run.seed}: {text}" for text in run.notes)
    return list(found)


def devices_of(job: int, jobs: int, ranks: int) -> dict[str, str]:
    """Returns the environment that gives a job its share of this machine's GPUs, if it has any.

    Raises ConfigError where there are too few.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        cards = [one for one in given.split(",") if one.strip()]
    else:
        import torch

        cards = [str(number) for number in range(torch.cuda.device_count())]
    if not cards:
        return {}
    if jobs * ranks > len(cards):
        raise ConfigError(
            f"{jobs} at a time (--jobs), of {ranks} rank{'s' * (ranks > 1)} each (--ranks), need "
            f"{jobs * ranks} GPUs, and there are {len(cards)}: ask for fewer, or train on the CPU "
            "(CUDA_VISIBLE_DEVICES= dtrain ablate ...)"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(cards[job * ranks : (job + 1) * ranks])}


def _what_went_wrong(launch: Launch) -> str:
    """Says in a line why a run did not come to its end; nothing where it was told to leave."""
    try:
        launch.insist("")
    except CheckError as error:
        if launch.late:
            return f"it took longer than {launch.timeout_s:g} seconds (--timeout)"
        killed = [(r, -c) for r, c in enumerate(launch.codes) if c < 0]
        if killed and all(code <= 0 for code in launch.codes):
            rank, signal = killed[0]
            return f"rank {rank} was killed by signal {signal}" + (
                " (out of memory?)" if signal == 9 else ""
            )
        words = launch.said().replace("  | ", "").strip().splitlines()
        # The parser of its arguments, say, has told why it left.
        told = [line for line in words if not line.startswith("the script left with ")]
        return told[-1].strip() if told else last_line(error)
    return ""


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
