"""The loop: fit -> epoch -> step. Newcomers start reading here.

Every rank runs this same code. A line that says "agreed" has the same value on all of them;
that is what keeps them together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from dtrain.callback import Callback, CheckpointSlot, Hooks
from dtrain.data import Feed, StepFeed
from dtrain.errors import CommError, DataError, RankMismatch, RemoteError
from dtrain.lane import Lane, Verdict
from dtrain.metrics import Means
from dtrain.microstep import MicroStep
from dtrain.precision import Precision
from dtrain.reporting import Reporter
from dtrain.state import Context, Progress, Report, ReportKind, Step
from dtrain.strategies import Strategy

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
    """

    epochs: int | None
    max_steps: int | None
    eval_every: int | str | None
    log_every: int

    def fulfilled_by(self, progress: Progress) -> str:
        """Returns why ``progress`` is all that was planned, or nothing where it is not."""
        if self.max_steps is not None and progress.step >= self.max_steps:
            return MAX_STEPS
        if self.epochs is not None and progress.epoch >= self.epochs:
            return ALL_EPOCHS
        return ""


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
    reporter: Reporter
    world_size: int
    evaluate: Callable[[], dict[str, float]]
    save: Callable[[dict[str, Any]], None]
    checkpoint: CheckpointSlot | None
    stop_reason: str = ""
    preempted: bool = False
    #: The end of an epoch that was saved, but whose `on_epoch_end` a resumed run still owes.
    epoch_evaluated: bool = False
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = time.perf_counter()
        self._samples_before = self.context.progress.samples
        self._loss_sum = self._loss_weight = 0.0  # since the last report; agreed
        self._saved_at = self._evaluated_at = -1
        self._save_asked = False
        self._warned_nonfinite = False

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint must hold of the loop itself."""
        return {
            "epoch_evaluated": self.epoch_evaluated,
            "stop_reason": "" if self.preempted else self.stop_reason,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` returned; the progress is restored already."""
        progress = self.context.progress
        self.epoch_evaluated = epoch_evaluated = state["epoch_evaluated"]
        # A run that had fulfilled its plan is continued by a larger one.
        reason = state["stop_reason"]
        self.stop_reason = "" if reason in (ALL_EPOCHS, MAX_STEPS) else reason
        self._samples_before = progress.samples
        self._saved_at = progress.step
        if epoch_evaluated:
            self._evaluated_at = progress.step

    # -- fit --------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains until the plan is fulfilled or a stop is agreed.

        Ranks: all, communicates.
        """
        progress = self.context.progress
        while not self._finished():
            self._run_epoch()
        if not self.preempted and self.plan.eval_every and self._evaluated_at != progress.step:
            self._evaluate()
        if self.checkpoint is not None or self.preempted:
            self._save_once()
        with self._phase("the end of fit"):
            self.hooks.fire(Callback.on_fit_end, self.context)

    def _finished(self) -> bool:
        self.stop_reason = self.stop_reason or self.plan.fulfilled_by(self.context.progress)
        # An epoch that is over is ended in form, also where the run stops with it.
        return bool(self.stop_reason) and not self.epoch_evaluated

    # -- epoch ------------------------------------------------------------------------------

    def _run_epoch(self) -> None:
        progress, context = self.context.progress, self.context
        if not self.epoch_evaluated:
            with self._phase("the start of an epoch"):
                self.hooks.fire(Callback.on_epoch_start, context)
            for step_feed in self.feed.epoch(progress.epoch, progress.step_in_epoch):
                if not self._step(step_feed):
                    break  # every rank's stream has ended
                self._after_step()
                if self._finished() and progress.step_in_epoch != self.feed.steps_per_epoch:
                    self._log()
                    self._settle()
                    return  # in the middle of an epoch
            if not progress.step_in_epoch:
                raise DataError(
                    f"no rank's stream gave a batch in epoch {progress.epoch}. A generator gives "
                    "its batches once: pass an object whose __iter__ begins anew."
                )
            self._log()
            self._settle()
            if self.plan.eval_every == "epoch":
                self._evaluate()
            self.epoch_evaluated = True
            due = self.checkpoint is not None and self.checkpoint.due_after_epoch(progress)
            if due or self._save_asked:
                self._save_once()
        with self._phase("the end of an epoch"):
            self.hooks.fire(Callback.on_epoch_end, context)
        self._settle()
        self.epoch_evaluated = False
        progress.epoch += 1
        progress.step_in_epoch = 0

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
        """Takes one global step; returns False where no rank had any data left."""
        context, hooks, progress = self.context, self.hooks, self.context.progress
        context.comm.mark_step(progress.step)
        step = Step(number=progress.step, micros=step_feed.micros)
        with self._alone("a training step"):
            hooks.fire(Callback.on_step_start, context, step)
            self.optimizer.zero_grad(set_to_none=True)
            self.lane.open()
            for micro in range(step_feed.micros):
                step.micro = micro
                self.strategy.run(step, step_feed, last=micro == step_feed.micros - 1)
            verdict = self.strategy.verdict()  # agreed, and all below follows from it
        if verdict.errors:
            self._raise_failures()
        if verdict.exhausted == self.world_size:
            return False
        with self._alone("a training step"):
            if verdict.weight > 0:
                self.precision.unscale(self.optimizer)
                self._normalise(verdict.factor)
                hooks.fire(Callback.on_grads_ready, context, step)
                step.applied = self.precision.step(self.optimizer)
            step.loss_mean, step.weight = verdict.loss_mean, verdict.weight
            self._count(step, verdict)
            hooks.fire(Callback.on_step_end, context, step)
        if verdict.stop or verdict.save or verdict.preempt:
            self._heed(self.micro_step.take_sent())
        return True

    def _normalise(self, factor: float) -> None:
        """Turns sums of weighted gradients into the gradient of the global mean."""
        if factor == 1.0:
            return
        grads = [
            p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None
        ]
        torch._foreach_mul_(grads, factor)

    def _count(self, step: Step, verdict: Verdict) -> None:
        progress = self.context.progress
        progress.step += 1
        progress.step_in_epoch += 1
        progress.updates += step.applied
        progress.samples += verdict.samples
        self.lane.observe(verdict)
        if verdict.weight > 0:
            self._loss_sum += verdict.loss_mean * verdict.weight
            self._loss_weight += verdict.weight
        if verdict.nonfinite and not self._warned_nonfinite:
            self._warned_nonfinite = True
            self.context.say(f"warning: the loss is not finite at step {step.number}")
        if verdict.skipped:
            self.context.log("skipped", verdict.skipped)

    # -- sync points: what is agreed between steps ----------------------------------------------

    def _log(self) -> None:
        """Agrees on training figures since the last report, and reports them."""
        if not self._loss_weight:
            return
        context = self.context
        with self._phase("agreeing on training metrics"):
            for name, logged in context.logged.items():
                for value in logged:
                    self.means.add(name, value, 1)
            context.logged.clear()
            values = {"train/loss": self._loss_sum / self._loss_weight}
            values |= self.means.agree(context.comm)
        values["lr"] = float(self.optimizer.param_groups[0]["lr"])
        values |= self.precision.values()
        self._loss_sum = self._loss_weight = 0.0
        context.metrics |= values
        self._report("train", values)

    def _evaluate(self) -> None:
        context = self.context
        self._evaluated_at = context.progress.step
        with self._phase("evaluation"):
            self.hooks.fire(Callback.on_eval_start, context)
            metrics = self.evaluate()
            self.hooks.fire(Callback.on_eval_end, context, metrics)
        context.metrics |= metrics
        self._report("eval", metrics)
        self._settle()

    def _save_once(self) -> None:
        step = self.context.progress.step
        self._save_asked = False
        if self._saved_at == step:
            return
        self._log()  # sums since the last report are in no checkpoint, so none may be open
        with self._phase("saving a checkpoint"):
            self.hooks.fire(Callback.on_save, self.context)
            self.save(self.state_dict())
        self._saved_at = step

    def _settle(self) -> None:
        """Agrees on what was requested since the last backward, and what is to be told."""
        context, pending = self.context, self.context.request.pending
        with self._phase("settling requests"):
            asked = torch.tensor([bool(pending[kind]) for kind in pending], dtype=torch.int64)
            if int(context.comm.all_reduce("requests", asked).sum()):
                self._heed(self.micro_step.take_pending())

    def _heed(self, mine: dict[str, list[str]]) -> None:
        """Gathers who asked for what; all ranks then know the same."""
        with self._phase("gathering requests"):
            by_rank = self.context.comm.gather_objects("reasons", mine)
        for kind in mine:
            reasons = [
                f"{why} (asked by rank {rank})" if self.world_size > 1 else why
                for rank, asked in enumerate(by_rank)
                for why in asked[kind]
            ]
            if not reasons:
                continue
            if len({why for asked in by_rank for why in asked[kind]}) == 1 and all(
                asked[kind] for asked in by_rank
            ):
                reasons = by_rank[0][kind][:1]  # all asked alike
            if kind == "save":
                self._save_asked = True
            else:
                self.preempted |= kind == "preempt"
                self.stop_reason = self.stop_reason or "; ".join(reasons)

    # -- failures ---------------------------------------------------------------------------

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A phase in which ranks meet only in comm's verbs: an error reaches all of them there."""
        try:
            yield
        except (RemoteError, RankMismatch, CommError):
            raise  # every rank has it
        except Exception as error:
            self.context.comm.fail(error, self.hooks.failed_in or name)
            raise

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """A phase in which others may wait in the reduction: an error is left in the store."""
        try:
            yield
        except Exception as error:
            self.context.comm.record(error, self.hooks.failed_in or name)
            raise

    def _raise_failures(self) -> None:
        """The lane said that some rank failed; nothing was updated. Raises on every rank."""
        trouble = self.micro_step.trouble
        self.context.comm.raise_failures(
            "failures in a step",
            None if trouble is None else trouble.error,
            "" if trouble is None else trouble.where,
        )

    # -- reports ----------------------------------------------------------------------------

    def _report(self, kind: ReportKind, values: dict[str, float], text: str = "") -> None:
        context, progress = self.context, self.context.progress
        for note in context.notes:
            self._send("message", {}, note)
        context.notes.clear()
        if kind in ("train", "eval"):
            self.history.append({"step": progress.step, "epoch": progress.epoch, **values})
        self._send(kind, values, text)

    def tell(self, kind: ReportKind, text: str) -> None:
        """Sends a text to the sinks.

        Ranks: all, local; rank 0's reaches the sinks.
        """
        self._report(kind, {}, text)

    def _send(self, kind: ReportKind, values: dict[str, float], text: str) -> None:
        progress = self.context.progress
        self.reporter.send(
            Report(
                kind=kind,
                step=progress.step,
                epoch=progress.epoch,
                values=dict(values),  # callbacks may keep and change theirs
                text=text,
                seconds=time.perf_counter() - self._began,
                samples=progress.samples - self._samples_before,
                total_steps=progress.total_steps,
                steps_per_epoch=progress.steps_per_epoch,
            )
        )
