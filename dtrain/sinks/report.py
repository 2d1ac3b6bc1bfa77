"""What a sink is handed: numbers, and nothing that can reach another rank."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dtrain.context import Shown

ReportKind = Literal["start", "train", "eval", "sample", "message", "end"]


@dataclass(frozen=True, slots=True)
class Report:
    """Numbers for sinks; nothing in it can reach another rank.

    Attributes:
        kind: ``start`` and ``end`` of a run, ``train`` and ``eval`` figures, a ``message``, or
            a ``sample``: a text or picture.
        step: global steps taken.
        epoch: the epoch, from 0.
        values: name to value, such as ``train/loss``, ``eval/accuracy``, ``lr``.
        text: for ``start``, ``message`` and ``end``: what to tell a person, in plain words.
        seconds: since ``fit`` began.
        samples: samples all ranks trained on since ``fit`` began.
        total_steps: steps planned, or None.
        steps_per_epoch: steps planned in an epoch, or None.
        config: for ``start``: the user's own settings.
        sample: for ``sample``: what to show.
    """

    kind: ReportKind
    step: int
    epoch: int
    values: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    seconds: float = 0.0
    samples: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    sample: Shown | None = None
