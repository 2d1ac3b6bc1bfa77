"""What befalls a drill's runs, drawn from a seed; and the trial of one rank that it befalls."""

import itertools
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dtrain.callback import Callback
from dtrain.callbacks import Checkpoint
from dtrain.checkpoint import CheckpointSlot
from dtrain.context import Context, Progress, Step
from dtrain.data import Data
from dtrain.distributed import World
from dtrain.plan import FitResult, Plan
from dtrain.sinks import FIGURES, Report
from dtrain.trainer import Trainer
from dtrain.trials.records import EventLog, digests
from dtrain.trials.runner import ScriptEnds, Trial

#: SIGKILL in a step; to a rank that has written half a file of a checkpoint; to rank 0 just before
#: or after the checkpoint gets its name; and SIGTERM to one rank.
Kind = Literal["kill all", "kill one", "kill writing", "kill renaming", "preempt"]


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What goes wrong, once."""

    kind: Kind
    step: int  # how many steps are done by then: with on_grads_ready, without that step's own
    rank: int = 0  # the one that suffers it
    hook: str = "on_step_end"  # where it is in a step; on_grads_ready is before the update
    place: int = 0  # at which of the rank's files, or at which moment, from 0

    @property
    def in_save(self) -> bool:
        return self.kind in ("kill writing", "kill renaming")

    def words(self, ranks: int) -> str:
        """Returns what is to be done, before it is known where it came to."""
        if self.kind == "kill all":
            return "kill -9 of all ranks" if ranks > 1 else "kill -9"
        if self.kind == "kill one":
            return f"kill -9 of rank {self.rank}"
        return "kill -9 within a save" if self.in_save else f"SIGTERM to rank {self.rank}"


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a script."""

    run_dir: str  # in place of the script's own
    steps: int  # global steps of the run, at most
    save_every: int  # a checkpoint every so many steps, beside the script's own
    disturbance: Disturbance | None = None  # what befalls this start; None leaves it alone


def draw(*, kills: int, ranks: int, steps: int, save_every: int, seed: int) -> list[Disturbance]:
    """Returns the disturbances of a drill, one a trial; the seed says which.

    So many kills fall in a step, on all ranks and on one in turn; half as many more on the making
    of a checkpoint, every ``save_every`` steps; and one rank is preempted.
    """
    drawing = random.Random(seed)
    drawn = [
        Disturbance(
            "kill one" if number % 2 and ranks > 1 else "kill all",
            # After the first checkpoint where there is one: before it, a run begins anew.
            step=drawing.randint(min(save_every + 1, steps - 1), steps - 1),
            rank=drawing.randrange(ranks) if number % 2 else 0,
            hook=drawing.choice(("on_grads_ready", "on_step_end")),
        )
        for number in range(kills)
    ]
    saved = [*range(save_every, steps, save_every)] or [steps]
    # A torn file, and a checkpoint that is whole but hardly in its place, in turn.
    for number in range((kills + 1) // 2):
        step = drawing.choice(saved)
        if number % 2:
            drawn.append(Disturbance("kill renaming", step, place=drawing.randrange(2)))
        else:
            rank = drawing.randrange(ranks)
            place = drawing.randrange(2 if rank else 5)  # of the files that it writes at least
            drawn.append(Disturbance("kill writing", step, rank, place=place))
    step = drawing.randint(1, steps - 2)  # the next one carries it to all ranks
    return [*drawn, Disturbance("preempt", step, rank=drawing.randrange(ranks))]


def make_trial(setup: dict[str, Any], folder: Path) -> "DrillTrial":
    """Returns the trial of one rank; ``setup`` is a :class:`Start`, from JSON."""
    given = setup["disturbance"]
    disturbance = None if given is None else Disturbance(**given)
    return DrillTrial(Start(**setup | {"disturbance": disturbance}), folder)


class DrillTrial(Trial):
    """Takes a few steps into another ``run_dir``, and tells what each consumed and gave.

    As the first callback, it sees batches as they come, before anybody changes them.
    """

    def __init__(self, start: Start, folder: Path) -> None:
        self.start, self._folder = start, folder

    def trainer_arguments(self, given: dict[str, Any], world: World) -> dict[str, Any]:
        self._log = log = EventLog(self._folder, world.rank)
        callbacks = list(given.get("callbacks", ()))
        saving = [one for one in callbacks if isinstance(one, CheckpointSlot)]
        has_run_dir = given.get("run_dir") is not None
        log.tell("facts", facts={"run_dir": has_run_dir, "checkpoint": bool(saving)})
        if not has_run_dir:
            self.done = True
            raise ScriptEnds  # whatever it does, nothing of it would be there after a kill
        if not saving:
            callbacks.append(Checkpoint(every_steps=self.start.save_every))
        for one in saving:
            _save_more(one, self.start.save_every)
        callbacks.append(_Injector(self.start.disturbance, log, self._folder, world))
        return given | {"callbacks": callbacks, "sinks": [], "run_dir": self.start.run_dir}

    def fit_arguments(self, trainer: Trainer, data: Data, given: dict[str, Any]) -> dict[str, Any]:
        never = given.get("resume") == "never"
        self._log.tell("facts", facts={"stream": data.is_stream, "never_resumes": never})
        # A report for each step: a save that is not planned closes none before its time.
        return given | {"log_every": 1, "resume": "never" if never else "auto"}

    def plan(self, plan: Plan) -> Plan:
        """Ends earlier; callbacks see the totals of the user's plan, because schedules do."""
        steps = self.start.steps
        return replace(plan, max_steps=min(plan.max_steps or steps, steps))

    def report(self, report: Report) -> None:
        """Tells figures here, not in a sink: what waits in its thread is lost with the process."""
        if report.kind in FIGURES:
            values = {name: float(value) for name, value in report.values.items()}
            self._log.tell("report", kind=report.kind, step=report.step, values=values)

    def finish(self, trainer: Trainer, result: FitResult) -> None:
        self._log.tell("ended", preempted=result.preempted)
        self.done = True

    def on_fit_start(self, ctx: Context) -> None:
        self._log.tell("began", step=ctx.progress.step)

    def on_step_start(self, ctx: Context, step: Step) -> None:
        self._samples: list[str] = []  # without those of a step that was broken off
        progress = ctx.progress
        self._rows = self.feed.rows(progress.epoch, progress.step_in_epoch)

    def on_batch(self, ctx: Context, step: Step) -> None:
        self._samples += digests(step.batch, step.samples)

    def on_step_end(self, ctx: Context, step: Step) -> None:
        self._log.tell("step", step=step.number, samples=self._samples, rows=self._rows)


class _Injector(Callback):
    """Last in the list: when it disturbs, all other callbacks have done what they do.

    The log is told just before. Ranks leave the numbers of their processes in ``folder``.
    """

    name = "drill: injector"

    def __init__(self, due: Disturbance | None, log: EventLog, folder: Path, world: World) -> None:
        self._due = due if due is not None and due.rank == world.rank else None
        self._log, self._rank = log, world.rank
        self._processes = [folder / f"process-{rank}.txt" for rank in range(world.size)]
        self._processes[world.rank].write_text(str(os.getpid()))

    def on_grads_ready(self, ctx: Context, step: Step) -> None:
        self._disturb_in("on_grads_ready", step.number, "before the update")

    def on_step_end(self, ctx: Context, step: Step) -> None:
        self._disturb_in("on_step_end", step.number + 1, "after the update")

    def on_save(self, ctx: Context) -> None:
        """Lays the disturbance into the making of this checkpoint, if it is to come there."""
        due = self._due
        if due is not None and due.in_save and ctx.progress.step == due.step:
            vars(os)["fsync"] = self._counted(os.fsync, due)

    def _disturb_in(self, hook: str, step: int, moment: str) -> None:
        due, rank = self._due, self._rank
        if due is None or due.in_save or (hook, step) != (due.hook, due.step):
            return
        if due.kind == "preempt":
            self._log.tell("disturbed", what=f"SIGTERM to rank {rank}")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        which = "all ranks" if due.kind == "kill all" else f"rank {rank}"
        self._log.tell("disturbed", what=f"kill -9 of {which}, {moment}")
        for other, process in enumerate(self._processes):
            if due.kind == "kill all" and other != rank:
                # In this step all of them are here: it took a reduction to come to it.
                os.kill(int(process.read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def _counted(self, fsync: Callable[[int], None], due: Disturbance) -> Callable[[int], None]:
        """Returns an ``fsync`` of which one call is the last.

        Each file of a checkpoint goes down to the disk, then the folder that they are in, and,
        once that has its name, the one above.
        """
        places = itertools.count()
        renaming = due.kind == "kill renaming"

        def counted(handle: int) -> None:
            fsync(handle)
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            of_checkpoint = "checkpoints" in (path.name, path.parent.name, path.parent.parent.name)
            if not of_checkpoint or path.is_dir() != renaming or next(places) < due.place:
                return
            if renaming:
                when = "after" if path.name == "checkpoints" else "before"
                what = f"just {when} it was renamed into place"
            else:
                os.truncate(path, path.stat().st_size // 2)
                what = f"half of {path.name} written"
            self._log.tell("disturbed", what=f"kill -9 within a save, {what}")
            os.kill(os.getpid(), signal.SIGKILL)

        return counted


def _save_more(checkpoint: CheckpointSlot, every: int) -> None:
    """Makes a checkpoint due every so many steps, beside those it makes by itself."""
    for name in ("due_after_step", "due_after_epoch"):
        vars(checkpoint)[name] = _or_every(every, getattr(checkpoint, name))


def _or_every(every: int, due: Callable[[Progress], bool]) -> Callable[[Progress], bool]:
    return lambda progress: due(progress) or progress.step % every == 0
