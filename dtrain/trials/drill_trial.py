"""A drill's trial: it writes to another ``run_dir``, saves more often, and may be killed in it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dtrain.callback import Callback
from dtrain.callbacks import Checkpoint
from dtrain.checkpoint import CheckpointSlot
from dtrain.context import Context, Progress, Step
from dtrain.data import Data
from dtrain.distributed import World
from dtrain.plan import FitResult, Plan
from dtrain.sinks import Report
from dtrain.trainer import Trainer
from dtrain.trials import samples as of
from dtrain.trials.drill_plan import Disturbance, Start
from dtrain.trials.inject import Injector
from dtrain.trials.records import EventLog
from dtrain.trials.runner import ScriptEnds, Trial


def make_trial(setup: dict[str, Any], folder: Path) -> "DrillTrial":
    """Returns the trial of one rank; ``setup`` is a :class:`Start`, from JSON."""
    given = setup["disturbance"]
    disturbance = None if given is None else Disturbance(**given)
    return DrillTrial(Start(**setup | {"disturbance": disturbance}), folder)


class DrillTrial(Trial):
    """Takes a few steps by the user's own plan, and tells what each of them consumed and gave.

    Ranks: all, local.
    """

    def __init__(self, start: Start, folder: Path) -> None:
        self.start, self._folder = start, folder

    def trainer_arguments(self, given: dict[str, Any], world: World) -> dict[str, Any]:
        """Adds checkpoints, and what records and disturbs."""
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
        injector = Injector(self.start.disturbance, log, self._folder, world)
        callbacks = [_Watcher(log), *callbacks, injector]
        return given | {"callbacks": callbacks, "sinks": [], "run_dir": self.start.run_dir}

    def fit_arguments(self, data: Data, given: dict[str, Any]) -> dict[str, Any]:
        """Goes on from the newest checkpoint, unless the script never does."""
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
        if report.kind in ("train", "eval"):
            values = {name: float(value) for name, value in report.values.items()}
            self._log.tell("report", kind=report.kind, step=report.step, values=values)

    def finish(self, trainer: Trainer, result: FitResult) -> None:
        """Tells how it ended."""
        self._log.tell("ended", preempted=result.preempted)
        self.done = True


class _Watcher(Callback):
    """First in the list: sees batches as they come, before anybody changes them."""

    name = "drill: watcher"

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def on_fit_start(self, ctx: Context) -> None:
        self._log.tell("began", step=ctx.progress.step)

    def on_step_start(self, ctx: Context, step: Step) -> None:
        self._samples: list[str] = []  # without those of a step that was broken off

    def on_batch(self, ctx: Context, step: Step) -> None:
        self._samples += of.digests(step.batch, step.samples)

    def on_step_end(self, ctx: Context, step: Step) -> None:
        self._log.tell("step", step=step.number, samples=self._samples)


def _save_more(checkpoint: CheckpointSlot, every: int) -> None:
    """Makes a checkpoint due every so many steps, beside those it makes by itself."""
    after_step, after_epoch = checkpoint.due_after_step, checkpoint.due_after_epoch

    def due(progress: Progress) -> bool:
        return progress.step % every == 0

    vars(checkpoint)["due_after_step"] = lambda progress: after_step(progress) or due(progress)
    vars(checkpoint)["due_after_epoch"] = lambda progress: after_epoch(progress) or due(progress)
