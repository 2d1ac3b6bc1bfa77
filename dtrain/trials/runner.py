"""Runs a user's script in this process, with a Trainer that follows a trial.

The script is not changed. What it gets as ``dtrain.Trainer`` asks a :class:`Trial` what to leave
out and what to record, and ends the script with its first ``fit``.
"""

import inspect
import runpy
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import dtrain
import dtrain.trainer
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
    feed: Feed  # what ``fit`` trains on, once it is known

    def trainer_arguments(self, given: dict[str, Any], world: World) -> dict[str, Any]:
        """Returns what the Trainer is made of, from what the script gives it."""
        return given

    def fit_arguments(self, data: Data, given: dict[str, Any]) -> dict[str, Any]:
        """Returns what ``fit`` is called with beside ``data``, which may be changed here."""
        return given

    def around_fit(self) -> AbstractContextManager[Any]:
        """Returns what ``fit`` runs in."""
        return nullcontext()

    def finish(self, trainer: Trainer, result: FitResult) -> None:
        """Takes what ``fit`` returned. Then the script ends."""


def run_script(trial: Trial, script: str) -> int:
    """Runs the script as ``__main__``; returns an exit code."""
    # Before the script imports either of them.
    vars(dtrain)["Trainer"] = vars(dtrain.trainer)["Trainer"] = _following(trial)
    try:
        runpy.run_path(script, run_name="__main__")
    except ScriptEnds:
        pass
    except SystemExit as left:
        if not trial.done and left.code not in (None, 0):
            print(f"the script left with {left.code!r}", file=sys.stderr)  # noqa: T201
            return FAILED
    except BaseException:  # noqa: BLE001 -- shown to the user, and the exit code tells
        if not trial.done:
            traceback.print_exc()
            return FAILED
    if not trial.done:
        return NEVER_FIT
    if (world := current()) is not None:
        world.close()
    return RECORDED


def _following(trial: Trial) -> type[Trainer]:
    class TrialTrainer(Trainer):
        """A Trainer that does as the trial wants, and ends the script."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            given = inspect.signature(Trainer).bind(*args, **kwargs).arguments
            world = current() or dtrain.init(seed=given.get("seed") or 0)
            made_of = trial.trainer_arguments(given, world)
            super().__init__(**made_of | {"callbacks": [trial, *made_of.get("callbacks", ())]})
            self.recorder = trial

        def fit(self, train: Any, *, batch_size: int | None = None, **given: Any) -> FitResult:
            data = Data.of(train, batch_size, shuffle=True)
            arguments = trial.fit_arguments(data, given)
            with trial.around_fit():
                result = super().fit(data, **arguments)
            trial.finish(self, result)
            raise ScriptEnds

        def _assemble(self, *args: Any) -> Any:
            loop = super()._assemble(*args)
            trial.feed = loop.feed
            return loop

    return TrialTrainer
