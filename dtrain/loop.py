"""The loop: fit -> epoch -> step. Newcomers start reading here.

Every rank runs this same code. A line that says "agreed" has the same value on all of them;
that is what keeps them together.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from dtrain.callback import Callback
from dtrain.checkpoint import BY_PLAN, CheckpointSlot, RunFiles, due_after_fit
from dtrain.context import Step
from dtrain.data import Feed, MicroBatches
from dtrain.distributed import ARRIVAL, EVALUATION, METRICS, SAVING, Phase
from dtrain.errors import DataError, RemoteError
from dtrain.plan import Plan
from dtrain.sinks import History
from dtrain.step import Agreed, Engine, StepResult


@dataclass
class Loop:
    """Runs a plan. The Trainer assembles it; each part is explained where it is made.

    Ranks: all, communicates.
    """

    plan: Plan
    feed: Feed
    evals: dict[str, Feed]  # by the prefix of their metrics
    engine: Engine
    history: History = field(init=False)
    files: RunFiles
    checkpoint: CheckpointSlot | None
    saves: bool  # False where a trial of the script wants no checkpoints
    runs_ahead: bool  # steps are not waited for: what became of one is looked at in the next (CUDA)
    stop_reason: str = ""
    preempted: bool = False
    failed_together: bool = False  # all ranks raise in the same step, of which nothing was applied
    epoch_evaluated: bool = False  # over, but for `on_epoch_end`, which a resumed run still owes
    epoch_is_cut: bool = False  # by the end of a rank's stream (`when_uneven="stop"`)
    owes_evaluation: bool = False  # the run left before one that was due

    def __post_init__(self) -> None:
        self.context, self.hooks = self.engine.context, self.engine.hooks
        self._saved_at = self._evaluated_at = -1
        #: Steps taken of which nobody has looked yet what became of them, and whether all ranks
        #: had waited for it before the update.
        self._in_flight: deque[tuple[Step, StepResult, bool]] = deque()
        self._save_asked = False

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint must hold of the loop itself."""
        return {
            "epoch_evaluated": self.epoch_evaluated,
            "epoch_is_cut": self.epoch_is_cut,
            "owes_evaluation": self.owes_evaluation,
            "evaluated_at": self._evaluated_at,
            "weight": self.engine.expected(),
            "epoch_sums": self.engine.figures.epoch_sums,
            "stop_reason": "" if self.preempted else self.stop_reason,
        } | self.engine.shares()

    def data_state(self) -> dict[str, Any] | None:
        """Returns what a checkpoint must hold of this rank's data, at this place in the plan."""
        progress = self.context.progress
        return self.feed.state_dict(progress.epoch, progress.step_in_epoch)

    def load_state_dict(self, state: dict[str, Any], data: dict[str, Any] | None) -> None:
        """Takes up what both returned; the progress is restored already."""
        progress = self.context.progress
        self.epoch_evaluated, self.epoch_is_cut = state["epoch_evaluated"], state["epoch_is_cut"]
        self.engine.expect(state["weight"])
        self.engine.figures.restore_epoch(state.get("epoch_sums"))
        # One that had fulfilled its plan is continued by a larger one.
        self.stop_reason = "" if state["stop_reason"] in BY_PLAN else state["stop_reason"]
        self._saved_at = progress.step
        self.owes_evaluation = state.get("owes_evaluation", False)
        at = progress.step if self.epoch_evaluated else -1
        self._evaluated_at = state.get("evaluated_at", at)
        at_end = self.epoch_evaluated or self.epoch_is_cut
        epoch, step = progress.epoch + at_end, 0 if at_end else progress.step_in_epoch
        if lost := self.feed.load_state_dict(data, ranks=state["ranks"], epoch=epoch, step=step):
            self.context.say(lost)

    # -- fit --------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains until the plan is fulfilled or a stop is agreed."""
        progress, replicas = self.context.progress, self.engine.replicas
        replicas.step = progress.step
        first = self.plan.eval_first and self._evaluated_at != progress.step == progress.first_step
        if self.plan.eval_every and (self.owes_evaluation or first):
            self._evaluate()
            if self._save_asked:
                self._save_once()
        while not self._finished():
            self._run_epoch()
        if not self.preempted and self.plan.eval_every and self._evaluated_at != progress.step:
            self._evaluate()
        if due_after_fit(self.checkpoint, progress) or self.preempted or self._save_asked:
            self._save_last()
        if self.plan.eval_every or self.hooks.come_after_steps():
            self._log(final=True)
        with self.engine.together(Phase("the end of fit", slow=True)):
            with self.engine.stand_in.stays():
                self.hooks.fire(Callback.on_fit_end, self.context)
            asked = replicas.settle("at the end of fit", self.engine.agreement.asked)
            late = asked > 0 and self.engine.agreement.settle().save
        if late:
            self._saved_at = -1  # the weights may be others now
            self._save_last()

    def _finished(self) -> bool:
        progress = self.context.progress
        self.stop_reason = self.stop_reason or self.plan.fulfilled_by(progress)
        # An epoch that is over is ended in form, also where the run stops; or by the next start.
        over = not self.preempted and progress.step_in_epoch == self.feed.steps_per_epoch
        return bool(self.stop_reason) and not (self.epoch_evaluated or over)

    # -- epoch ------------------------------------------------------------------------------

    def _run_epoch(self) -> None:
        progress, context = self.context.progress, self.context
        if not self.epoch_evaluated:
            with self.engine.together(Phase("the start of an epoch", slow=True)):
                self.engine.modes.mend()
                self.hooks.fire(Callback.on_epoch_start, context)
                self.feed.begin(progress.epoch)
                if changed := self.plan.take_length(progress, self.feed.steps_per_epoch):
                    context.say(changed)
                for part in self.engine.parts:
                    part.strategy.refresh()  # a callback may have frozen or added something
                self.engine.modes.note()
            # Resumed from a checkpoint of an epoch's last step, there is none left to take.
            left = self.feed.epoch(progress.epoch, progress.step_in_epoch)
            for step_feed in () if self.epoch_is_cut else left:
                done = self._step(step_feed)
                if done:
                    self._after_step()
                if self.epoch_is_cut:
                    break
                if self._finished():
                    self._settle(quiet=self._log())
                    return  # in the middle of an epoch
                if not done:
                    break  # every rank's stream has ended
            if not progress.step_in_epoch:
                raise DataError(
                    f"no rank's stream gave a batch in epoch {progress.epoch} (or, with "
                    "when_uneven='stop', not every rank's). A generator gives its batches once: "
                    "pass an object whose __iter__ begins anew."
                )
            self._settle(quiet=self._log())
            if self.preempted:
                return  # first saved; the next start evaluates
            if means := self.engine.figures.end_epoch():
                self._report("epoch", means)
            if self.plan.eval_every == "epoch":
                self._evaluate()
            self.epoch_evaluated = True
            due = self.checkpoint is not None and self.checkpoint.due_after_epoch(progress)
            if due or self._save_asked:
                self._save_once()
        if self.hooks.has(Callback.on_epoch_end):
            with self.engine.together(Phase("the end of an epoch", slow=True)):
                self.hooks.fire(Callback.on_epoch_end, context)
            self._settle()
        self.epoch_evaluated = self.epoch_is_cut = False
        progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0

    def _after_step(self) -> None:
        progress = self.context.progress
        if progress.step % self.plan.log_every == 0:
            self._log()
        every = self.plan.eval_every
        if isinstance(every, int) and progress.step % every == 0:
            self._settle(quiet=self._log())
            self.owes_evaluation = self.preempted
            if not self.preempted:
                self._evaluate()
        due = self._save_asked or (self.checkpoint and self.checkpoint.due_after_step(progress))
        is_last = progress.step_in_epoch == self.feed.steps_per_epoch  # saved after the evaluation
        if due and not (is_last or self._finished()):
            self._settle()
            self._save_once()

    # -- step -------------------------------------------------------------------------------

    def _step(self, feed: MicroBatches) -> bool:
        """Takes one global step; returns False where a step had to be left undone."""
        engine, context, progress = self.engine, self.context, self.context.progress
        with engine.in_step(progress.step):
            if not context.model.training:
                engine.modes.mend()
            step = Step(number=progress.step, micros=feed.micros)
            self.hooks.fire(Callback.on_step_start, context, step)
            updates = engine.updates  # of several optimizers, each has one
            for batches in (feed,) if updates is None else updates.turns(step, feed):
                result = self._accumulate(step, batches)
                if not self._finish():  # what is in flight: by now it has arrived
                    return False
                # Fused SGD has no momentum that it could leave alone before its first update.
                waits = not self.runs_ahead or progress.updates <= engine.micro_step.trained.since
                gate = result.gate(waits=waits)
                if not gate.undone:
                    blocked = engine.update(step, gate)
                    result.settle(blocked, step.held)
                    progress.step += step.ends
                    progress.step_in_epoch += step.ends
                    if not waits:
                        self.hooks.fire_step_end(context, step, late=False)
                self._in_flight.append((step, result, waits))
                if waits and not self._finish():
                    return False
            return True

    def _accumulate(self, step: Step, feed: MicroBatches) -> StepResult:
        """Runs the micro-batches and reduces their gradients; nothing is read."""
        engine, context, strategy = self.engine, self.context, self.engine.strategy
        strategy.clear(context.optimizer)
        engine.lane.open()
        for micro in range(feed.micros):
            step.micro = micro
            strategy.run(step, feed, last=micro == feed.micros - 1)
        if self.runs_ahead and step.loss is not None:
            # While it is in flight, its graph would live on, into the forward of the next.
            step.loss.mean = step.loss.mean.detach()
        engine.clock.reduced()
        context.comm.activity.enter(ARRIVAL)
        step.result = result = StepResult(strategy, context.progress, counts=not step.counted)
        return result

    def _finish(self) -> bool:
        """Looks what became of the steps in flight; returns False where one was left undone.

        The only reader of a verdict: it is agreed, and all below follows from it.
        """
        progress = self.context.progress
        while self._in_flight:
            step, result, waited = self._in_flight.popleft()
            if not waited:
                self.context.comm.activity.enter(ARRIVAL)
                self.context.comm.mark_step(step.number)
            verdict = result.verdict()
            if verdict.undone and step.number < progress.step:
                progress.step -= 1  # it changed nothing: whoever goes on takes it again
                progress.step_in_epoch -= 1
            if verdict.errors:
                self.failed_together = not step.counted
                self.engine.raise_failures(step)
            if verdict.stop or verdict.save or verdict.preempt:
                self._heed(self.engine.agreement.carried())
            if verdict.changed and not waited:
                self.engine.strategy.adopt(in_step=True)
            self.epoch_is_cut |= bool(verdict.ending)
            if verdict.undone:
                return False
            if waited:
                self.engine.figures.count(step, verdict)
                if step.ends:
                    self.hooks.fire(Callback.on_step_end, self.context, step)
            else:
                result.arrive()
                self.engine.figures.count(step, verdict)
                self.hooks.fire_step_end(self.context, step, late=True)
                self.context.comm.mark_step(progress.step)
        return True

    # -- sync points: what is agreed between steps ----------------------------------------------

    def _log(self, *, final: bool = False) -> bool:
        """Agrees on training figures since the last report, and reports them.

        Where no step was taken since, only the ``final`` call looks for what was logged. Returns
        whether it is agreed that nobody has requested anything.
        """
        self._finish()
        if not final:
            self.files.retry_failed_save()
        if not (final or self.engine.figures.counted):
            return False
        with self.engine.together(METRICS):
            if note := self.feed.look_apart():
                self.context.say(note)
            self.history.check()
            figures, asked = self.engine.figures, self.engine.agreement.asked
            values = figures.agree(self.engine.strategy.check_alike, asked)
        if values:
            self.context._take(values)
            self.history.report("train", values)
        return not figures.means.asked

    def _evaluate(self) -> None:
        self._evaluated_at, self.owes_evaluation = self.context.progress.step, False
        with self.engine.together(EVALUATION), self.engine.stand_in.evaluated():
            metrics = self.engine.evaluation.run(self.evals)
        self._report("eval", metrics)
        self._settle()

    def _report(self, kind: Literal["eval", "epoch"], figures: dict[str, float]) -> None:
        """Reports figures that a checkpoint may be kept for: it must be made at this step."""
        self.context._take(figures)
        self.history.report(kind, figures)
        if self.checkpoint is not None and self.checkpoint.due_for(kind, figures):
            self._save_asked, self._saved_at = True, -1  # one made before lacks these figures

    def _save_once(self, *, ended: bool = False) -> None:
        step = self.context.progress.step
        self._save_asked = False
        self.context.comm.activity.enter(SAVING)
        if self.files.saver.finish() is not None:
            self.files.tell_failed_save("now")
            self._saved_at = -1
        if self._saved_at == step:
            return
        self._log()  # sums since the last report are in no checkpoint, so none may be open
        with self.engine.together(SAVING), self.engine.stand_in.stands_aside():
            self.hooks.fire(Callback.on_save, self.context)
            if self.saves:
                self.files.save(self.state_dict(), self.data_state(), ended=ended)
        self._saved_at = step

    def _save_last(self) -> None:
        """Saves, and returns once it is written. Here a failure is an error."""
        if self.engine.stand_in.changes_at_end or (self.files.may_go_on and not self.preempted):
            self._saved_at = -1  # at this step, but as if the fit went on
        self._save_once(ended=True)
        if self.files.saver.finish() is not None:
            self._save_once(ended=True)  # again: what was wrong may be over
        saver = self.files.saver
        if saver.finish() is not None:
            self.context.comm.raise_failures(
                "the last checkpoint",
                None if isinstance(saver.failure, RemoteError) else saver.failure,
                "saving a checkpoint",
            )

    def _settle(self, *, quiet: bool = False) -> None:
        """Agrees on what was requested since the last backward, unless that is nothing."""
        self._finish()
        with self.engine.together(Phase("settling requests", slow=True)):
            self._heed(Agreed() if quiet else self.engine.agreement.settle())

    def _heed(self, agreed: Agreed) -> None:
        self._save_asked |= agreed.save
        self.preempted |= agreed.preempt
        self.stop_reason = self.stop_reason or agreed.stop_reason
