"""Runs a user's script on one rank, with a Trainer that keeps records and can be struck.

The script is not changed. Its Trainer writes to another ``run_dir``, saves more often, takes a
few steps only, and ends the script after its first ``fit``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dtrain
from dtrain.callback import Callback
from dtrain.callbacks import Checkpoint
from dtrain.checkpoint import CheckpointSlot
from dtrain.context import Context, Progress, Step
from dtrain.data import Data, Feed, as_data
from dtrain.distributed import current
from dtrain.loop import Loop
from dtrain.plan import Plan
from dtrain.sinks import Dispatcher, Report
from dtrain.trainer import FitResult, Trainer
from dtrain.trials.drill.orders import Start
from dtrain.trials.drill.record import Recorder
from dtrain.trials.drill.strike import Striker
from dtrain.trials.equivalence import samples as of
from dtrain.trials.equivalence.hosting import Enough, host


class Probe:
    """What one rank's Trainer is to do in one start, and whether it is done.

    Args:
        start: how to run.
        folder: where to write.

    Ranks: all, local.
    """

    def __init__(self, start: Start, folder: Path) -> None:
        self.start = start
        self.folder = folder
        self.done = False


class Watcher(Callback):
    """First in the list: sees batches as they come, before anybody changes them."""

    name = "drill: watcher"

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._samples: list[str] = []

    def on_fit_start(self, ctx: Context) -> None:
        """Tells from which step the run goes on."""
        self._recorder.tell("began", step=ctx.progress.step)

    def on_step_start(self, ctx: Context, step: Step) -> None:
        """Forgets what a step that was broken off had consumed."""
        self._samples = []

    def on_batch(self, ctx: Context, step: Step) -> None:
        """Notes which samples came."""
        self._samples += of.digests(step.batch, step.samples)

    def on_step_end(self, ctx: Context, step: Step) -> None:
        """Tells what the step consumed."""
        self._recorder.tell("step", step=step.number, samples=self._samples)


def drilling(probe: Probe) -> type[Trainer]:
    """Returns a Trainer that does as ``probe`` wants."""
    start = probe.start

    class DrilledTrainer(Trainer):
        """A Trainer that records what it does, and may be killed in it."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = inspect.signature(Trainer).bind(*args, **kwargs).arguments
            world = current() or dtrain.init(seed=given.get("seed") or 0)
            recorder = Recorder(probe.folder, world.rank)
            self._recorder = recorder
            callbacks = list(given.get("callbacks", ()))
            saving = [one for one in callbacks if isinstance(one, CheckpointSlot)]
            self._facts: dict[str, Any] = {
                "run_dir": given.get("run_dir") is not None,
                "checkpoint": bool(saving),
            }
            recorder.tell("facts", facts=self._facts)
            if not self._facts["run_dir"]:
                probe.done = True
                raise Enough  # whatever it does, nothing of it would be there after a kill
            if not saving:
                callbacks.append(Checkpoint(every_steps=start.save_every))
            for one in saving:
                _save_more(one, start.save_every)
            striker = Striker(start.fault, recorder, probe.folder, world.rank, world.size)
            given |= {
                "callbacks": [Watcher(recorder), *callbacks, striker],
                "sinks": [],
                "run_dir": start.run_dir,
            }
            super().__init__(**given)

        def fit(self, train: Any, **options: Any) -> FitResult:
            """Takes a few steps by the user's own plan, and ends the script."""
            data = as_data(train, options.get("batch_size"), shuffle=True)
            never = options.get("resume") == "never"
            facts = {"stream": data.is_stream, "never_resumes": never}
            self._facts |= facts
            self._recorder.tell("facts", facts=self._facts)
            fixed = {
                "batch_size": None,
                # A report for each step: a save that is not planned closes none before its time.
                "log_every": 1,
                "resume": "never" if never else "auto",
            }
            result = super().fit(data, **(options | fixed))
            self._recorder.tell("ended", preempted=result.preempted)
            probe.done = True
            raise Enough

        def _assemble(
            self, plan: Plan, data: Data, evals: dict[str, Feed], dispatcher: Dispatcher
        ) -> Loop:
            # Callbacks see the totals of the user's own plan, because schedules go by them.
            loop = super()._assemble(plan, data, evals, dispatcher)
            most = start.steps if plan.max_steps is None else min(plan.max_steps, start.steps)
            loop.plan = replace(loop.plan, max_steps=most)
            if self.world.is_main:
                # Here, not in a sink: what waits in a sink's thread is lost with the process.
                vars(dispatcher)["send"] = self._told
            return loop

        def _told(self, report: Report) -> None:
            if report.kind in ("train", "eval"):
                values = {name: float(value) for name, value in report.values.items()}
                self._recorder.tell("report", kind=report.kind, step=report.step, values=values)

    return DrilledTrainer


def run_script(setup: str, folder: Path, script: str, args: Sequence[str]) -> int:
    """Runs the script as ``setup`` (a :class:`Start` in JSON) says; returns an exit code.

    Ranks: all; communicates where the script does.
    """
    probe = Probe(Start.from_json(setup), folder)
    return host(drilling(probe), script, args, lambda: probe.done)


def _save_more(checkpoint: CheckpointSlot, every: int) -> None:
    """Makes a checkpoint due every so many steps, beside those it makes by itself."""
    own = checkpoint.due_after_step

    def due_after_step(progress: Progress) -> bool:
        return own(progress) or progress.step % every == 0

    vars(checkpoint)["due_after_step"] = due_after_step
    by_epoch = checkpoint.due_after_epoch

    def due_after_epoch(progress: Progress) -> bool:
        return by_epoch(progress) or progress.step % every == 0

    vars(checkpoint)["due_after_epoch"] = due_after_epoch
