"""The fits of one Trainer: which of its run's a call is, and what is taken up before it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dtrain.callback import Callback, Hooks
from dtrain.checkpoint import (
    Asked,
    ResumeMode,
    RunFiles,
    RunState,
    Saved,
    compare_fits,
    load_plain,
    load_state,
)
from dtrain.context import Context, Progress
from dtrain.data import Data
from dtrain.distributed import check_same_call, seed_everything
from dtrain.errors import ConfigError
from dtrain.plan.plan import FitResult, Plan
from dtrain.step import Engine

_RANK_STREAM = 0  # of those that are derived from a seed; others are the Trainer's


@dataclass(eq=False)
class Phases:
    """Finds the fit that a call is, in this process and in the run that an earlier one has left.

    Ranks: all, communicates.
    """

    context: Context
    files: RunFiles
    run_state: RunState
    engine: Engine
    hooks: Hooks
    sinks_files: Sequence[str]  # in ``run_dir``, that sinks write
    seed: int
    live: bool = False  # the run is under way in this process
    new: bool = False  # the fit to come has not been under way before
    left: str = ""  # why an earlier call has left it, to be gone on with by another start
    saved: Saved | None = None  # in which the fit to come is under way
    _has_weights: bool = False  # of the run; what the script has changed since is to stay

    def enter(
        self, name: str | None, data: Data, plan: Plan, resume: ResumeMode
    ) -> FitResult | None:
        """Finds which fit a call is, and returns what that has come to if it is over.

        Else the progress counts from its beginning, and the run stands where that was, or is.
        """
        fits, files, now = self.run_state.fits, self.files, self.context.progress
        if not self.live:
            where, world = {"run_dir": bool(self.context.run_dir)}, self.run_state.world
            check_same_call(where, world.comm)
            if world.told_to_leave:
                self.context.say(
                    f"note: a fit of another Trainer was told to leave ({world.told_to_leave}); "
                    "this one begins all the same: end the script where result.preempted says so"
                )
            files.find(resume, self.sinks_files)
            fits = self.run_state.fits
        place = fits.place(name)
        about = {"batch size": data.batch_size, "order": data.order_name, "samples": data.length}
        fingerprint = self.run_state.describe(about, self.seed)
        if self.live and fits.is_over(place, *plan.limits):
            return self._returned(place)
        if self.live and place < len(fits.known):
            compare_fits(self.run_state.fingerprint, fingerprint, self.context.say)
            plan.check_left(now)
        self.run_state.fingerprint, self.saved, self.new = fingerprint, None, False
        if not self.live and files.saved is not None:
            goes_on = files.decide(fingerprint, Asked(place, name, *plan.limits))
            # What the script changes after its last call of a fit that is over, it changes as then.
            if place == len(fits.known) - (not goes_on) and fits.known[-1].is_over:
                self._has_weights &= goes_on  # what it changed before that, that fit has trained
                self._take_up_end(files.saved)
            elif goes_on:
                self.saved = files.saved
            else:
                self._take_weights(files.saved)
            if not goes_on:
                return self._returned(place)
        self.new = fits.begin(place, name, now)
        if self.new and place:
            self.engine.stand_in.leave()
        else:
            self.engine.stand_in.take_out()
        return None

    def _returned(self, place: int) -> FitResult:
        fits = self.run_state.fits
        fit, at = fits.returned(place), self.context.progress.step
        if place == len(fits.known) - 1:
            self.files.finish(fit.reason)
        self.context.say(
            f"{fits.words(place)} of this run is over ({fit.reason}, at step {fit.steps}): its "
            "result is returned, and nothing is trained"
            + (f"; the model holds the weights of step {at}" if self._has_weights else "")
        )
        return FitResult.of_earlier(fit, *self.files.last_and_best())

    def seed_rank(self) -> None:
        """Gives this rank streams of its own; a later start of the run draws fresh ones."""
        rank, step = self.engine.seat.rank, self.context.progress.step
        seed_everything(self.seed, _RANK_STREAM, rank, step)

    def left_undone(self) -> FitResult:
        """Returns what a fit comes to that may not begin, as the run was told to leave."""
        self.context.say(
            f"the run was told to leave ({self.left}), so no further fit begins: start the script "
            "again, and it goes on"
        )
        reached = self.left, True, list[dict[str, float]](), *self.files.last_and_best()
        return FitResult.of(self.context.progress, dict(self.context.metrics), *reached)

    def _take_weights(self, saved: Saved) -> None:
        """Loads weights and progress of the run, once; not into a model that is not as it was."""
        fits, now = self.run_state.fits.known, self.context.progress
        if self._has_weights:
            return
        state = load_plain(saved.path)  # an optimizer's state is not needed yet
        self.run_state.restore_progress(state)
        now.phase = len(fits) - (not fits[-1].is_over)
        now.first_step = now.step if fits[-1].is_over else fits[-1].step
        now.first_epoch = now.epoch if fits[-1].is_over else fits[-1].epoch
        if self.run_state.describe({}, 0)["model"] != state["fingerprint"]["model"]:
            self.context.say(
                f"the model that was saved at step {saved.step} has other tensors than this one, "
                "which so keeps its own until the script has changed it as it did then"
            )
            return
        self._has_weights = True
        extra = load_state(saved.path)["extra"] if state.get("extra") else {}
        self.run_state.restore_weights(saved, extra, over=fits[-1].is_over)

    def _take_up_end(self, saved: Saved) -> None:
        """Takes up a run where one of its fits was over, as if this process had trained that."""
        last = self.run_state.fits.known[-1]
        now = self.context.progress
        self.run_state.begin(live=False, resumes=True)
        state = self.run_state.restore(saved, weights=False)
        if not self._has_weights:
            self.run_state.restore_weights(saved, state.get("extra", {}), over=True)
        self._has_weights = True
        now.phase = len(self.run_state.fits.known) - 1
        now.first_step, now.first_epoch = last.step, last.epoch
        now.total_steps, now.total_epochs = last.total_steps, last.total_epochs
        now.steps_per_epoch = last.steps_per_epoch
        # Callbacks take up what they had then; and next begin a further fit, as they would have.
        self.hooks.fire(Callback.on_fit_start, self.context)
        self.engine.streams.begin()
        self.run_state.restore_rest(saved, state, self.seed_rank)
        self.engine.streams.rest()
        self.files.open_saver()
        self.live = True

    def restore(self) -> Progress:
        """Loads weights and progress of the run, before its first fit in this process."""
        if self.live:
            raise ConfigError("trainer.restore() comes before the first fit of a script")
        self.files.find("auto", self.sinks_files)
        self.run_state.fits.restored = True
        if self.files.saved is not None:
            self._take_weights(self.files.saved)
        return replace(self.context.progress)  # as it was now: the fits to come count on

    def ended(self, reason: str, *, preempted: bool) -> None:
        """Notes how the fit has ended."""
        fits, now = self.run_state.fits, self.context.progress
        fits.end(now, "" if preempted else reason, self.context.metrics)
        if preempted:
            self.left = self.run_state.world.told_to_leave = reason
        else:
            fits.returned(len(fits.known) - 1)

    def failed(self) -> None:
        """Has the next call begin what this one was to, if nothing of that was trained."""
        now = self.context.progress
        if not self.live:
            self.files.forget()
        elif self.new and now.step == now.first_step:
            self.run_state.fits.known.pop()

    @property
    def must_end(self) -> bool:
        """Whether the run was told to leave, so that no other fit may begin in this process.

        In an interactive session a person goes on with what they have interrupted.
        """
        return bool(self.left) and not hasattr(sys, "ps1")
