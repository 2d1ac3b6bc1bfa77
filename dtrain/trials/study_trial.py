"""A study's trial: the whole script, with a variant's changes, a seed, and the study's run_dir."""

import resource
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dtrain.callback import listed
from dtrain.context import Context, Step
from dtrain.data import Data
from dtrain.distributed import World, derive_seed, seed_everything
from dtrain.errors import ConfigError, CrashLoop
from dtrain.plan import FitResult
from dtrain.sinks import Console, JSONLines
from dtrain.trainer import Trainer
from dtrain.trials.changes import Change
from dtrain.trials.overriding import (
    callback_names,
    check,
    check_optimizer,
    judged_by,
    override,
    refuse,
    remember_arguments,
)
from dtrain.trials.records import digest_of_tensors
from dtrain.trials.runner import ScriptEnds, Trial
from dtrain.trials.study_files import RunNote, start_of, write_json, write_run

PROBE = "probe.json"
_TIMED = 4096  # so many steps, the newest, are looked at for how long one takes
_HEAD = 4096  # numbers of each tensor go into the digest of what a training began with


@dataclass(frozen=True, slots=True)
class Setup:
    """One start of a script in a study."""

    variant: str
    seed: int
    overrides: list[dict[str, Any]]  # as Variant.overrides
    words: list[str]  # all changes, for people
    #: Only look what the script has, up to its first ``fit``, and whether these could be changed.
    wanted: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """What a script was seen to have when its first ``fit`` began."""

    callbacks: list[str]
    evaluates: bool
    best: list[str] | None  # metric and mode, by which it says itself what is best
    refused: str = ""  # why a change could not be made


def make_trial(setup: dict[str, Any], folder: Path) -> "StudyTrial":
    """Returns the trial of one rank; ``setup`` is a :class:`Setup`, from JSON."""
    return StudyTrial(Setup(**setup), folder)


class StudyTrial(Trial):
    """Runs the script to its end, as one variant with one seed, and notes what became of it.

    As the first callback, it sees weights and the time as a step begins.
    """

    ends_script = False
    error: BaseException | None = None  # with which the script has ended

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self._folder = setup, folder
        self._changes = [Change(**one) for one in setup.overrides]
        self._began = time.perf_counter()
        self._trainers = 0
        self._is_main = False
        self._override: dict[str, Any] = {}
        self._step_began: float | None = None
        self._steps_s: deque[float] = deque(maxlen=_TIMED)
        self._preempted = False
        # One that goes on began where its first start did.
        self._note = RunNote(setup.variant, setup.seed, changes=setup.words, start=start_of(folder))
        remember_arguments()
        # A script that seeds nothing makes its model of these.
        seed_everything(setup.seed)

    def init_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        return given | {"seed": self.setup.seed}

    def trainer_arguments(self, given: dict[str, Any], world: World) -> dict[str, Any]:
        self._is_main, seed = world.is_main, self.setup.seed
        self._device = world.device
        if given.get("seed") is not None:
            given = given | {"seed": derive_seed(seed, self._trainers) if self._trainers else seed}
        callbacks = list(listed("callbacks", given.get("callbacks", ())))
        self._trainers += 1
        if self.setup.wanted is not None:
            self._callbacks = callbacks
            return given
        left, self._override, idle = override(self._changes, callbacks)
        if self._trainers == 1:
            refuse(idle, callbacks)  # a further one may lack what the first has
        sinks = given.get("sinks")
        sinks = [Console()] if sinks is None else list(sinks)
        if not any("metrics.jsonl" in sink.files for sink in sinks):
            sinks.append(JSONLines())
        where = self._folder / f"trainer-{self._trainers}" if self._trainers > 1 else self._folder
        about = {"variant": self.setup.variant, "changes": self.setup.words, "seed": seed}
        if world.is_main and self.setup.words:
            print(f"dtrain ablate: {', '.join(self.setup.words)}", flush=True)  # noqa: T201
        return given | {
            "callbacks": left,
            "sinks": sinks,
            "run_dir": where,
            "config": {**(given.get("config") or {}), "ablation": about},
        }

    def fit_arguments(self, trainer: Trainer, data: Data, given: dict[str, Any]) -> dict[str, Any]:
        if self.setup.wanted is not None:
            self._probe(trainer, given)
            raise ScriptEnds
        self.done = False
        place = trainer.context.run_dir
        assert place is not None
        own = place.name if place.name.startswith("trainer-") else ""
        self._write(fits=self._note.fits + 1, place=own)
        more: dict[str, Any] = {"override": {**(given.get("override") or {}), **self._override}}
        if given.get("resume") in ("must", "emergency"):
            more["resume"] = "auto"
        return given | more

    def finish(self, trainer: Trainer, result: FitResult) -> None:
        self.done = True
        self._preempted |= result.preempted
        self._write(steps=result.steps, stop_reason=result.stop_reason)

    def evaluated(self, figures: dict[str, float]) -> None:
        self._note = replace(self._note, evaluated=dict(figures))

    def ended(self, error: BaseException | None) -> None:
        self.error = error
        if self.setup.wanted is not None or not self._trainers:
            return
        facts: dict[str, Any] = {"state": "finished"}
        if not self.done:
            facts = {"state": "failed", "error": in_a_line(error)}
            if error is None:
                facts["error"] = "its training failed, and the script went on without it"
        elif self._preempted:
            facts = {"left": True}
        elif self._is_main and not (self._folder / self._note.place / "status.json").exists():
            gone = "the script has deleted its run_dir, and its figures with it"
            facts = {"state": "failed", "error": gone}
        elif error is not None:
            facts["notes"] = [f"after its training the script ended with {in_a_line(error)}"]
        step_s = median(self._steps_s) if self._steps_s else None
        seconds = time.perf_counter() - self._began
        self._write(**facts, seconds=seconds, step_s=step_s, memory=self._memory())

    def on_fit_start(self, ctx: Context) -> None:
        if self._note.fits == 1 and not ctx.progress.step and not self._note.start:
            tensors = {n: p.detach().reshape(-1)[:_HEAD] for n, p in ctx.model.named_parameters()}
            self._write(start=digest_of_tensors(tensors))

    def on_epoch_start(self, ctx: Context) -> None:
        self._step_began = None

    def on_step_start(self, ctx: Context, step: Step) -> None:
        now = time.perf_counter()
        if self._step_began is not None:
            self._steps_s.append(now - self._step_began)
        self._step_began = now

    def on_eval_start(self, ctx: Context) -> None:
        self._step_began = None

    def on_save(self, ctx: Context) -> None:
        self._step_began = None

    def _probe(self, trainer: Trainer, given: dict[str, Any]) -> None:
        refused = ""
        try:
            for one in self.setup.wanted or ():
                check(Change(**one), self._callbacks)
                check_optimizer(Change(**one), trainer.optimizer)
        except ConfigError as error:
            refused = str(error)
        evaluates = (
            given.get("eval_set") is not None and given.get("eval_every", "epoch") is not None
        )
        names = callback_names(self._callbacks)
        found = Probe(names, evaluates, judged_by(self._callbacks), refused)
        self.done = True
        if self._is_main:
            write_json(self._folder / PROBE, asdict(found))

    def _memory(self) -> int:
        """Returns the most bytes so far: of the GPU, else of the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _write(self, **facts: Any) -> None:
        self._note = replace(self._note, **facts)
        if self._is_main:
            write_run(self._folder, self._note)


def in_a_line(error: BaseException | None) -> str:
    """Returns what a script ended with, in one line."""
    if error is None:
        return "the script ended without having called Trainer.fit"
    if isinstance(error, SystemExit):
        return str(error) if isinstance(error, CrashLoop) else f"exit status {error.code!r}"
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
