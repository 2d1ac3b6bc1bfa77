"""What a sink is, what it is handed, and what it cannot do without: a folder, or a package."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dtrain.context import Shown
from dtrain.errors import ConfigError

OnError = Literal["warn", "raise"]
ReportKind = Literal["start", "train", "epoch", "eval", "sample", "message", "end"]

FIGURES = ("train", "epoch", "eval")  # the kinds that are rows


@dataclass(frozen=True, slots=True)
class Report:
    """Numbers for sinks; nothing in it can reach another rank.

    Attributes:
        kind: ``start`` and ``end`` of a run, ``train`` and ``eval`` figures, an ``epoch``'s means
            of training figures, a ``message``, or a ``sample``: a text or picture.
        step: global steps taken.
        epoch: the epoch, from 0.
        values: name to value, such as ``train/loss``, ``epoch/loss``, ``eval/accuracy``, ``lr``.
        text: for ``start``, ``message`` and ``end``: what to tell a person, in plain words.
        seconds: since ``fit`` began.
        samples: samples all ranks trained on since the run began.
        updates: steps whose update was applied, since the run began.
        total_steps: steps planned, or None.
        steps_per_epoch: steps planned in an epoch, or None.
        total_epochs: epochs planned, or None.
        config: for ``start``: the user's own settings.
        facts: for ``start``: ``hooks`` (callbacks' names by hook, in their order) and
            ``environment`` (ranks, device, versions), as JSON values.
        sample: for ``sample``: what to show.
    """

    kind: ReportKind
    step: int
    epoch: int
    values: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    seconds: float = 0.0
    samples: int = 0
    updates: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    total_epochs: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    sample: Shown | None = None


class Sink:
    """Takes a run's figures somewhere, in a thread of its own.

    Override :meth:`write`; it is handed frozen numbers and can reach no other rank. All three
    methods run in the same thread.

    A run that is continued takes steps again. Its first report but for messages is a ``start`` with
    the step it goes on from: what was written about later ones is then to be dropped. (``CSV`` and
    ``JSONLines`` do so; what cannot be taken back, as with wandb, is there twice.)

    Attributes:
        on_error: ``"warn"``: a failure is reported once, the sink left out, and the training
            goes on; ``"raise"``: the run ends on all ranks at the next sync point.
        files: names of what it keeps in the run's folder, which ``resume="never"`` moves aside.

    Ranks: rank 0 only.
    """

    on_error: OnError = "warn"
    files: Sequence[str] = ()

    def open(self, run_dir: Path | None) -> None:
        """The run begins, once this returns; ``run_dir`` is its folder, or None if it has none."""

    def write(self, report: Report) -> None:
        """One report: see :class:`dtrain.Report` for its kinds."""

    def flush(self) -> None:
        """A checkpoint is being made: what was written so far must be on the disk."""

    def close(self) -> None:
        """The run is over, well or badly; what is buffered must be written now."""


def place_in(run_dir: Path | None, name: str, *, sink: str) -> Path:
    """Returns where ``name`` is in the run's folder; raises ConfigError if the run has none."""
    if run_dir is None:
        raise ConfigError(
            f"{sink} writes {name} into the run's folder, and this run has none: name one with "
            'Trainer(run_dir="runs/first"), or remove the sink'
        )
    return run_dir / name


def check_package(name: str, *, sink: str) -> None:
    """Raises ConfigError if there is no such package; it is not imported: that takes a second."""
    # A mere folder of that name in the current one, as wandb makes, has no origin.
    if getattr(importlib.util.find_spec(name), "origin", None) is None:
        raise ConfigError(f"{sink} needs the package {name}: pip install dtrain[{name}]")
