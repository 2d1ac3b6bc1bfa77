"""Runs a user's script in this process, with a Trainer that follows a trial.

The script is not changed. What it gets as ``dtrain.Trainer`` asks a :class:`Trial` what to leave
out and what to record, and most end the script with its first ``fit``.
"""

import inspect
import runpy
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import dtrain
import dtrain.distributed
import dtrain.trainer
import dtrain.tuning  # before there is another Trainer: what it tries is no trial's
from dtrain.callback import Callback
from dtrain.data import Data, Feed
from dtrain.distributed import World, current
from dtrain.plan import FitResult, Recorder
from dtrain.trainer import Trainer
from dtrain.trials.fork_server import FAILED, NEVER_FIT, RECORDED


class ScriptEnds(BaseException):
    """Ends the script, all being recorded. No ``except Exception`` takes it."""


class Trial(Recorder, Callback):
    """What becomes of a script's training, on one rank; its first callback, too. Ranks: all, local.

    This one lets it be.
    """

    done = False  # all that was wanted is recorded; it no longer matters how the script ends
    ends_script = True  # with its first ``fit``
    feed: Feed  # what ``fit`` trains on, once it is known

    def init_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Returns what ``dtrain.init`` is called with, from what the script calls it with."""
        return given

    def trainer_arguments(self, given: dict[str, Any], world: World) -> dict[str, Any]:
        """Returns what the Trainer is made of, from what the script gives it."""
        return given

    def fit_arguments(self, trainer: Trainer, data: Data, given: dict[str, Any]) -> dict[str, Any]:
        """Returns what ``fit`` is called with beside ``data``, which may be changed here."""
        return given

    def around_fit(self) -> AbstractContextManager[Any]:
        """Returns what ``fit`` runs in."""
        return nullcontext()

    def finish(self, trainer: Trainer, result: FitResult) -> None:
        """Takes what ``fit`` returned. Then the script ends, if this ends it."""

    def evaluated(self, figures: dict[str, float]) -> None:
        """Takes what ``Trainer.evaluate`` returns to the script."""

    def ended(self, error: BaseException | None) -> None:
        """The script has ended, by itself or with this."""


def run_script(trial: Trial, script: str) -> int:
    """Runs the script as ``__main__``; returns an exit code."""
    # Before the script imports either of them.
    vars(dtrain)["Trainer"] = vars(dtrain.trainer)["Trainer"] = _following(trial)
    vars(dtrain)["init"] = vars(dtrain.distributed)["init"] = _initialising(trial)
    error: BaseException | None = None
    try:
        runpy.run_path(script, run_name="__main__")
    except ScriptEnds:
        pass
    except SystemExit as left:
        if left.code not in (None, 0):
            error = left
            if not trial.done:
                print(f"the script left with {left.code!r}", file=sys.stderr)  # noqa: T201
    except BaseException as raised:  # noqa: BLE001 -- shown to the user, and the exit code tells
        error = raised
        if not (trial.done and trial.ends_script):
            traceback.print_exc()
    trial.ended(error)
    if not trial.done:
        return NEVER_FIT if error is None else FAILED
    if (world := current()) is not None:
        world.close()
    return RECORDED


def _initialising(trial: Trial) -> Callable[..., World]:
    init = dtrain.distributed.init

    @wraps(init)
    def as_the_trial_wants(**given: Any) -> World:
        return init(**trial.init_arguments(given))

    return as_the_trial_wants


def _following(trial: Trial) -> type[Trainer]:
    class TrialTrainer(Trainer):
        """A Trainer that does as the trial wants, which may end the script."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = inspect.signature(Trainer).bind(*args, **kwargs).arguments
            world = current() or dtrain.init(seed=given.get("seed") or 0)
            made_of = trial.trainer_arguments(given, world)
            super().__init__(**made_of | {"callbacks": [trial, *made_of.get("callbacks", ())]})
            self.recorder = trial

        def fit(self, train: Any, *, batch_size: int | None = None, **given: Any) -> FitResult:
            data = Data.of(train, batch_size, shuffle=True)
            arguments = trial.fit_arguments(self, data, given)
            with trial.around_fit():
                result = super().fit(data, **arguments)
            trial.finish(self, result)
            if trial.ends_script:
                raise ScriptEnds
            return result

        def evaluate(self, data: Any, *, batch_size: int | None = None) -> dict[str, float]:
            figures = super().evaluate(data, batch_size=batch_size)
            trial.evaluated(figures)
            return figures

        def _assemble(self, *args: Any) -> Any:
            loop = super()._assemble(*args)
            trial.feed = loop.feed
            return loop

    return TrialTrainer
