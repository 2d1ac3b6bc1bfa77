"""The loop: fit -> epoch -> step. Newcomers start reading here.

Every rank runs this same code. A line that says "agreed" has the same value on all of them;
that is what keeps them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from dtrain.callback import Callback, Hooks
from dtrain.checkpoint import CheckpointSlot, Saver
from dtrain.context import Context, Outbox, Progress, Step
from dtrain.data import Feed, StepFeed
from dtrain.distributed import (
    ARRIVAL,
    BETWEEN,
    EVALUATION,
    METRICS,
    SAVING,
    UPDATE,
    World,
)
from dtrain.errors import DataError, RemoteError
from dtrain.metrics import Means
from dtrain.sinks import History, Report
from dtrain.step import (
    Agreed,
    Agreement,
    Arriving,
    Factor,
    Lane,
    MicroStep,
    Precision,
    StepResult,
    Verdict,
)
from dtrain.strategies import Strategy
from dtrain.watchdog import SECONDS_METRIC, StragglerClock

ALL_EPOCHS = "all epochs done"
MAX_STEPS = "max_steps reached"


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to train, and what to do on the way.

    Attributes:
        epochs: epochs in all, or None for no such limit.
        max_steps: global steps in all, or None.
        eval_every: ``"epoch"``, or every so many steps; None never evaluates.
        log_every: training figures are agreed and reported every so many steps.
        eval_first: evaluate before the first step, too.
    """

    epochs: int | None
    max_steps: int | None
    eval_every: int | str | None
    log_every: int
    eval_first: bool = False

    def fulfilled_by(self, progress: Progress) -> str:
        """Returns why ``progress`` is all that was planned, or nothing where it is not."""
        if self.max_steps is not None and progress.step >= self.max_steps:
            return MAX_STEPS
        if self.epochs is not None and progress.epoch >= self.epochs:
            return ALL_EPOCHS
        return ""


class Recorder:
    """What a trial of a script changes in a run, and is told of it. This one changes nothing.

    ``dtrain check`` and ``dtrain drill`` set a Trainer's :attr:`~dtrain.Trainer.recorder`.

    Attributes:
        saves: whether checkpoints are made.

    Ranks: all, local.
    """

    saves = True

    def plan(self, plan: Plan) -> Plan:
        """Returns how long to train; callbacks see the totals of the plan that is given."""
        return plan

    def samples_of(self, world: World) -> World:
        """Returns whose samples this rank trains on."""
        return world

    def report(self, report: Report) -> None:
        """Takes what sinks will be handed, on rank 0, as soon as it is known."""


@dataclass
class Loop:
    """Runs a plan. The Trainer assembles it; each part is explained where it is made."""

    plan: Plan
    feed: Feed
    context: Context
    hooks: Hooks
    strategy: Strategy
    micro_step: MicroStep
    lane: Lane
    precision: Precision
    optimizer: Optimizer
    means: Means
    agreement: Agreement
    clock: StragglerClock
    history: History
    outbox: Outbox
    world_size: int
    evaluate: Callable[[], dict[str, float]]
    save: Callable[[dict[str, Any], dict[str, Any] | None], None]
    saver: Saver
    checkpoint: CheckpointSlot | None
    #: Steps are not waited for: what became of one is looked at in the next (CUDA).
    delays: bool = False
    stop_reason: str = ""
    preempted: bool = False
    #: All ranks raise in the same step, of which nothing was applied.
    failed_together: bool = False
    #: The end of an epoch that was saved, but whose `on_epoch_end` a resumed run still owes.
    epoch_evaluated: bool = False
    #: A rank's stream has ended, and with it the epoch (`when_uneven="stop"`).
    epoch_is_cut: bool = False

    def __post_init__(self) -> None:
        self._loss_sum = self._loss_weight = 0.0  # since the last report; agreed
        self._saved_at = self._evaluated_at = -1
        self._pending: tuple[Step, StepResult] | None = None
        self._save_asked = False
        self._warned_nonfinite = False
        self._failed_save: Exception | None = None  # the last one that was told of

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint must hold of the loop itself."""
        return {
            "epoch_evaluated": self.epoch_evaluated,
            "epoch_is_cut": self.epoch_is_cut,
            "weight": self.lane.expected if self.micro_step.weighed else 0.0,
            "stop_reason": "" if self.preempted else self.stop_reason,
            "ranks": self.world_size,
        }

    def data_state(self) -> dict[str, Any] | None:
        """Returns what a checkpoint must hold of this rank's data, at this place in the plan."""
        progress = self.context.progress
        return self.feed.state_dict(progress.epoch, progress.step_in_epoch)

    def load_state_dict(self, state: dict[str, Any], data: dict[str, Any] | None) -> None:
        """Takes up what both returned; the progress is restored already.

        Raises:
            ResumeError: the data cannot be gone on with at this number of ranks.
        """
        progress = self.context.progress
        self.epoch_evaluated = epoch_evaluated = state["epoch_evaluated"]
        self.epoch_is_cut = state["epoch_is_cut"]
        if state["weight"]:
            self.lane.expect(state["weight"])
            self.micro_step.weighed = True
        # A run that had fulfilled its plan is continued by a larger one.
        reason = state["stop_reason"]
        self.stop_reason = "" if reason in (ALL_EPOCHS, MAX_STEPS) else reason
        self._saved_at = progress.step
        if epoch_evaluated:
            self._evaluated_at = progress.step
        at_end = epoch_evaluated or self.epoch_is_cut
        lost = self.feed.load_state_dict(
            data,
            ranks=state["ranks"],
            epoch=progress.epoch + at_end,
            step=0 if at_end else progress.step_in_epoch,
        )
        if lost:
            self.context.say(lost)

    @property
    def failed_here(self) -> bool:
        """Where all raise in the same step: whether it is because of this rank."""
        return self.micro_step.trouble is not None

    # -- fit --------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains until the plan is fulfilled or a stop is agreed.

        Ranks: all, communicates.
        """
        progress = self.context.progress
        if self.plan.eval_first and not progress.step and self.plan.eval_every:
            self._evaluate()
        while not self._finished():
            self._run_epoch()
        if not self.preempted and self.plan.eval_every and self._evaluated_at != progress.step:
            self._evaluate()
        if self.checkpoint is not None or self.preempted:
            self._save_last()
        self._log(final=True)
        with self.context.comm.lockstep(self._at("the end of fit")):
            self.hooks.fire(Callback.on_fit_end, self.context)

    def _finished(self) -> bool:
        self.stop_reason = self.stop_reason or self.plan.fulfilled_by(self.context.progress)
        # An epoch that is over is ended in form, also where the run stops with it.
        return bool(self.stop_reason) and not self.epoch_evaluated

    # -- epoch ------------------------------------------------------------------------------

    def _run_epoch(self) -> None:
        progress, context = self.context.progress, self.context
        if not self.epoch_evaluated:
            with self.context.comm.lockstep(self._at("the start of an epoch")):
                self.hooks.fire(Callback.on_epoch_start, context)
                self.strategy.refresh()  # a callback may have frozen something
            for step_feed in self._steps_of_epoch():
                done = self._step(step_feed)
                if done:
                    self._after_step()
                if self.epoch_is_cut:
                    break
                if self._finished() and progress.step_in_epoch != self.feed.steps_per_epoch:
                    self._log()
                    self._settle()
                    return  # in the middle of an epoch
                if not done:
                    break  # every rank's stream has ended
            if not progress.step_in_epoch:
                raise DataError(
                    f"no rank's stream gave a batch in epoch {progress.epoch} (or, with "
                    "when_uneven='stop', not every rank's). A generator gives its batches once: "
                    "pass an object whose __iter__ begins anew."
                )
            self._log()
            self._settle()
            if self.plan.eval_every == "epoch":
                self._evaluate()
            self.epoch_evaluated = True
            due = self.checkpoint is not None and self.checkpoint.due_after_epoch(progress)
            if due or self._save_asked:
                self._save_once()
        with self.context.comm.lockstep(self._at("the end of an epoch")):
            self.hooks.fire(Callback.on_epoch_end, context)
        self._settle()
        self.epoch_evaluated = self.epoch_is_cut = False
        progress.epoch += 1
        progress.step_in_epoch = 0

    def _steps_of_epoch(self) -> Iterator[StepFeed]:
        progress = self.context.progress
        if self.epoch_is_cut:
            return iter(())  # resumed from a checkpoint of its last step
        return self.feed.epoch(progress.epoch, progress.step_in_epoch)

    def _after_step(self) -> None:
        progress = self.context.progress
        at_end = progress.step_in_epoch == self.feed.steps_per_epoch
        if progress.step % self.plan.log_every == 0:
            self._log()
        every = self.plan.eval_every
        if isinstance(every, int) and progress.step % every == 0:
            self._log()
            self._settle()
            self._evaluate()
        if at_end:
            return  # saved after the epoch's evaluation
        due = self.checkpoint is not None and self.checkpoint.due_after_step(progress)
        if due or self._save_asked:
            self._settle()
            self._save_once()

    # -- step -------------------------------------------------------------------------------

    def _step(self, step_feed: StepFeed) -> bool:
        """Takes one global step; returns False where it had to be left undone, for want of data."""
        context, hooks, progress = self.context, self.hooks, self.context.progress
        context.comm.mark_step(progress.step)
        self.clock.begin_step()
        activity = context.comm.activity
        activity.begin_step(progress.step)
        step = Step(number=progress.step, micros=step_feed.micros)
        with context.comm.alone(self._at("a training step")):
            hooks.fire(Callback.on_step_start, context, step)
            self.strategy.clear(self.optimizer)
            self.lane.open()
            for micro in range(step_feed.micros):
                step.micro = micro
                self.strategy.run(step, step_feed, last=micro == step_feed.micros - 1)
            self.clock.reduced()
            activity.enter(ARRIVAL)
            step.result = result = StepResult(self.strategy, progress)
        if not self._conclude():
            activity.end_lap(BETWEEN)
            return False
        # Fused SGD has no momentum that it could leave alone before its first update.
        if self.delays and progress.updates:
            with context.comm.alone(self._at("a training step")):
                self.strategy.check_arrived()
                self._update(step, result)
                self._pending = step, result
                progress.step += 1
                progress.step_in_epoch += 1
                hooks.fire_step_end(context, step, late=False)
            self.clock.end_step()
            activity.end_lap(BETWEEN)
            return True
        verdict = result.verdict()  # agreed, and all below follows from it
        self._take_notice(verdict)
        if verdict.starved or verdict.leaving or not verdict.fed:
            activity.end_lap(BETWEEN)
            return False
        with context.comm.alone(self._at("a training step")):
            if verdict.weight > 0:
                self._update(step, result, verdict)
            progress.step += 1
            progress.step_in_epoch += 1
            self._count(step, result)
            hooks.fire(Callback.on_step_end, context, step)
        self.clock.end_step()
        activity.end_lap(BETWEEN)
        return True

    def _conclude(self) -> bool:
        """Takes notice of a step that was not waited for: by now its result has arrived.

        Returns:
            False where that step had to be left undone.
        """
        if self._pending is None:
            return True
        step, result = self._pending
        self._pending = None
        self.context.comm.activity.enter(ARRIVAL)
        self.context.comm.mark_step(step.number)
        progress, verdict = self.context.progress, result.verdict()
        undone = bool(verdict.errors or verdict.leaving)
        if undone:  # it changed nothing: whoever goes on takes it again
            progress.step -= 1
            progress.step_in_epoch -= 1
        self._take_notice(verdict)
        if undone:
            return False
        with self.context.comm.alone(self._at("a training step")):
            self._count(step, result)
            self.hooks.fire_step_end(self.context, step, late=True)
        self.context.comm.mark_step(self.context.progress.step)
        return True

    def _take_notice(self, verdict: Verdict) -> None:
        if verdict.errors:
            self.failed_together = True
            self._raise_failures()
        if verdict.stop or verdict.save or verdict.preempt:
            self._heed(self.agreement.carried())
        self.epoch_is_cut = bool(verdict.ending)

    def _update(self, step: Step, result: StepResult, verdict: Verdict | None = None) -> None:
        """Updates the parameters; without a verdict, only if it turns out that they may be."""
        self.context.comm.activity.enter(UPDATE)
        factor = result.heard.factor() if verdict is None else verdict.factor
        self._normalise(self.precision.unscale(self.optimizer, factor))
        self.hooks.fire(Callback.on_grads_ready, self.context, step)
        if step.vetoed:
            self.precision.skip()
            self.context.log("vetoed", 1 / self.world_size, "sum")
        elif verdict is None:
            blocked = self.precision.step_unless(self.optimizer, result.heard.veto())
            result.settle(blocked=Arriving(blocked.reshape(1)))
        else:
            result.settle(blocked=not self.precision.step(self.optimizer))

    def _normalise(self, factor: Factor) -> None:
        """Turns sums of weighted gradients into the gradient of the global mean."""
        if isinstance(factor, float) and factor == 1.0:
            return
        torch._foreach_mul_(self.strategy.gradients(self.optimizer), factor)

    def _count(self, step: Step, result: StepResult) -> None:
        progress, verdict = self.context.progress, result.verdict()
        result.arrive()
        progress.samples += verdict.samples
        self.lane.observe(verdict)
        # A step that was left out for its loss must not make the whole report's loss NaN.
        if verdict.weight > 0 and not (step.vetoed and verdict.nonfinite):
            self._loss_sum += verdict.loss_mean * verdict.weight
            self._loss_weight += verdict.weight
        if verdict.nonfinite and not self._warned_nonfinite:
            self._warned_nonfinite = True
            self.context.say(f"warning: the loss is not finite at step {step.number}")
        if verdict.skipped:
            self.context.log("skipped", verdict.skipped / self.world_size, "sum")

    # -- sync points: what is agreed between steps ----------------------------------------------

    def _log(self, *, final: bool = False) -> None:
        """Agrees on training figures since the last report, and reports them.

        Where no step was taken since, only the ``final`` call looks for what was logged.
        """
        self._conclude()
        if not final:
            self._retry_failed_save()
        if not self._loss_weight and not final:
            return
        context = self.context
        context.comm.activity.enter(METRICS)
        with self.context.comm.lockstep(self._at("agreeing on training metrics")):
            for name, logged in self.outbox.logged.items():
                self.means.add_logged(name, logged.values, logged.reduce)
            self.outbox.logged.clear()
            self.history.check()
            values = {}
            if self._loss_weight:
                values["train/loss"] = self._loss_sum / self._loss_weight
            self.means.add(SECONDS_METRIC, self.clock.seconds, 1)
            values |= self.means.agree(context.comm)
            if straggler := self.clock.compare(values.pop(SECONDS_METRIC)):
                context.say(f"warning: {straggler}")
        if not values:
            return
        values["lr"] = float(self.optimizer.param_groups[0]["lr"])
        values |= self.precision.values()
        self._loss_sum = self._loss_weight = 0.0
        context.metrics |= values
        self.history.report("train", values)

    def _evaluate(self) -> None:
        context = self.context
        self._evaluated_at = context.progress.step
        context.comm.activity.enter(EVALUATION)
        with self.context.comm.lockstep(self._at("evaluation")):
            self.hooks.fire(Callback.on_eval_start, context)
            metrics = self.evaluate()
            self.hooks.fire(Callback.on_eval_end, context, metrics)
        context.metrics |= metrics
        self.history.report("eval", metrics)
        context.comm.activity.enter(BETWEEN)
        self._settle()

    def _save_once(self) -> None:
        step = self.context.progress.step
        self._save_asked = False
        self.context.comm.activity.enter(SAVING)
        if self.saver.finish() is not None:
            self._tell_failed_save("now")
            self._saved_at = -1
        if self._saved_at == step:
            return
        self._log()  # sums since the last report are in no checkpoint, so none may be open
        self.context.comm.activity.enter(SAVING)
        with self.context.comm.lockstep(self._at("saving a checkpoint")):
            self.hooks.fire(Callback.on_save, self.context)
            self.save(self.state_dict(), self.data_state())
        self._saved_at = step
        self.context.comm.activity.enter(BETWEEN)

    def _save_last(self) -> None:
        """Saves, and returns once it is written. Here a failure is an error."""
        self._save_once()
        if self.saver.finish() is not None:
            self._save_once()  # again: what was wrong may be over, and nothing else can be lost
        if (failure := self.saver.finish()) is not None:
            mine = None if isinstance(failure, RemoteError) else failure
            self.context.comm.raise_failures("the last checkpoint", mine, "saving a checkpoint")
        self.context.comm.activity.enter(BETWEEN)

    def _retry_failed_save(self) -> None:
        """Asks for another where a checkpoint could not be written; not where that failed, too."""
        if self.saver.failures > 1:
            self._tell_failed_save("when the next one is due")
        elif self._tell_failed_save("soon"):
            self.context.request.save("the last checkpoint could not be written")

    def _tell_failed_save(self, again: str) -> bool:
        """Tells of a checkpoint that could not be written, once; returns whether it did."""
        failure = self.saver.failure
        if failure is None or failure is self._failed_save:
            return False
        self._failed_save = failure
        self.context.say(f"warning: {failure}. Training goes on; it is tried again {again}.")
        return True

    def _settle(self) -> None:
        """Agrees on what was requested since the last backward."""
        self._conclude()
        with self.context.comm.lockstep("settling requests"):
            self._heed(self.agreement.settle())

    def _heed(self, agreed: Agreed) -> None:
        self._save_asked |= agreed.save
        self.preempted |= agreed.preempt
        self.stop_reason = self.stop_reason or agreed.stop_reason

    # -- failures ---------------------------------------------------------------------------

    def _at(self, phase: str) -> Callable[[], str]:
        """Where an error happened: in a hook, if one raised it, else in the phase."""
        return lambda: self.hooks.failed_in or phase

    def _raise_failures(self) -> None:
        """The lane said that some rank failed; nothing was updated. Raises on every rank."""
        trouble = self.micro_step.trouble
        self.context.comm.raise_failures(
            "failures in a step",
            None if trouble is None else trouble.error,
            "" if trouble is None else trouble.where,
        )
