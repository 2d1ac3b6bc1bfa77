"""What runs of a check leave behind, and where the numbers of two of them part.

Gradients decide, parameters only where gradients say nothing. An optimizer such as Adam divides
each gradient by its own size, so that what is zero but for rounding still moves its parameter by
a whole step, in any direction.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from dtrain.trials.records import EventLog, events


@dataclass(slots=True)
class Record:
    """What one rank saw."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)  # of each step, over all ranks
    own_losses: list[float] = field(default_factory=list)  # of this rank's micro-batches, as the
    own_weights: list[float] = field(default_factory=list)  # loss function returned them
    dtype: str = ""  # in which the loss came
    samples: list[list[str]] = field(default_factory=list)  # by step, a digest of each of its own
    settings: list[list[dict[str, Any]]] = field(default_factory=list)  # the optimizer's, by step
    own_parameters: str = ""  # a digest of this rank's, after the last step
    batch_size: int | None = None  # the global batch the script asked for; None for a stream
    given_model: str = ""  # a digest of it as the script made it, before ranks were made equal
    seen: list[str] = field(default_factory=list)  # of dropout, batchnorm, mixup: what was on
    moving_buffers: list[str] = field(default_factory=list)  # that training changes

    # What a look at the loss function and the data found after the last step, if it was asked for:
    # how far a batch's loss is from the weighted mean of two parts' losses, relative to it, where
    # that is farthest (None where it is not known), and in words; and more.
    mean_gap: float | None = None
    mean_evidence: str = ""
    padding_gap: float | None = None  # the same, where each part is collated by itself
    padding_evidence: str = ""
    draws: str = ""  # what in the loss function draws random numbers, dropout aside, in words
    data_draws: bool = False  # the same sample comes out otherwise from other random streams
    data_wanders: bool = False  # ... from the same streams, fetched again
    failures: list[str] = field(default_factory=list)  # what could not be tried, and why

    def write(self, folder: Path, rank: int) -> None:
        EventLog(folder, rank).tell("record", record=asdict(self))


@dataclass(frozen=True, slots=True)
class Results:
    """A run's folder, read: every rank's record, and rank 0's tensors when asked for."""

    folder: Path
    ranks: list[Record]

    @classmethod
    def read(cls, folder: Path, ranks: int) -> "Results":
        told = (events(folder, rank)[-1]["record"] for rank in range(ranks))
        return cls(folder, [Record(**record) for record in told])

    @property
    def main(self) -> Record:
        return self.ranks[0]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def forget_gradients(self) -> None:
        """Deletes them: they are most of what a run leaves on the disk."""
        for path in self.folder.glob(f"{gradients_name('*')}.safetensors"):
            path.unlink()


def gradients_name(step: int | str) -> str:
    """Returns the name of the file with the gradients of a step, or a pattern for all steps."""
    return f"gradients-{step}"


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far rounding alone may lead."""

    loss: float  # of the largest loss
    gradient: float  # of a tensor's largest gradient
    #: Of the model's largest gradient: no tensor's counts as less, because rounding comes from
    #: the sums that gradients are made of, which do not shrink with the tensor's own.
    floor: float
    parameter: float  # of the farthest that the tensor's numbers moved
    #: Of the model's largest gradient: a number whose gradient was once less may be driven by
    #: rounding, and its parameter decides nothing. (Without any gradient, it does decide.)
    weak: float


# Rounding is near 1e-16 of what is summed, and a sum's error some hundred times that. A wrong
# mean or another sample shows in the first digits. These lie in between.
DOUBLE = Tolerance(loss=1e-9, gradient=1e-8, floor=1e-4, parameter=1e-6, weak=1e-6)
# Rounding is near 1e-7 here, so small faults hide in it.
SINGLE = Tolerance(loss=1e-4, gradient=1e-3, floor=1e-2, parameter=3e-2, weak=1e-2)


@dataclass(frozen=True, slots=True)
class Parted:
    """A tensor whose numbers part."""

    name: str  # of the parameter
    gap: float  # relative to its largest gradient (or to how far it moved)
    step: int | None  # the first in which gradients part; None where only the parameters do


@dataclass(frozen=True, slots=True)
class Comparison:
    """One run against the truth."""

    title: str  # which run
    loss_gap: float  # the largest difference of a step's loss, relative to the largest loss
    worst: str  # the tensor with the largest gap, parted or not
    worst_gap: float
    parted: tuple[Parted, ...]  # the tensors that part, the farthest first
    zero_gradients: tuple[str, ...]  # that differ only where their gradient is only rounding
    loss_parts: bool
    strays: tuple[int, ...] = ()  # ranks whose parameters did not end as rank 0's, to the bit

    @property
    def equal(self) -> bool:
        return not (self.parted or self.loss_parts or self.strays)

    @property
    def first_step(self) -> int | None:
        """The first step whose gradients part."""
        return min((p.step for p in self.parted if p.step is not None), default=None)


def compare(title: str, truth: Results, run: Results, tolerance: Tolerance) -> Comparison:
    """Compares a run with the truth."""
    gaps: dict[str, float] = {}
    first: dict[str, int] = {}
    weak: dict[str, Tensor] = {}  # numbers whose gradient was once near rounding
    moving: dict[str, Tensor] = {}  # numbers that had any gradient at all
    for step in range(min(truth.main.steps, run.main.steps)):
        mine, theirs = (one.tensors(gradients_name(step)) for one in (truth, run))
        for name, gap in gradient_gaps(mine, theirs, tolerance.floor).items():
            gaps[name] = max(gaps.get(name, 0.0), gap)
            if gap > tolerance.gradient:
                first.setdefault(name, step)
        near_zero = tolerance.weak * max(map(_largest, mine.values()), default=0.0)
        for name in mine.keys() & theirs.keys():
            a, b = mine[name], theirs[name]
            weak[name] = weak.get(name, False) | (a.abs() <= near_zero)
            moving[name] = moving.get(name, False) | (a != 0) | (b != 0)
    parted = [Parted(name, gaps[name], step) for name, step in first.items()]
    zero = []
    start, mine, theirs = truth.tensors("initial"), truth.tensors("final"), run.tensors("final")
    for name in [name for name in mine if name in weak and name not in first]:
        driven = weak[name] & moving[name]
        gap, drifted = parameter_gap(start[name], mine[name], theirs[name], driven, tolerance)
        count = mine[name].numel()
        if gap > tolerance.parameter:
            parted.append(Parted(name, gap, None))
        elif drifted:
            zero.append(name if drifted == count else f"{name} ({drifted} of {count} numbers)")
    loss_gap = _loss_gap(truth.main.losses, run.main.losses)
    worst, worst_gap = max(gaps.items(), key=lambda item: item[1], default=("", 0.0))
    farthest = tuple(sorted(parted, key=lambda p: p.gap, reverse=True))
    parts = loss_gap > tolerance.loss
    own = [rank.own_parameters for rank in run.ranks]
    strays = tuple(rank for rank, digest in enumerate(own) if digest != own[0])
    return Comparison(title, loss_gap, worst, worst_gap, farthest, tuple(zero), parts, strays)


def gradient_gaps(
    mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], floor: float
) -> dict[str, float]:
    """Returns how far each tensor's gradients are apart, relative to its largest in ``mine``.

    Infinite where one is missing or not finite. No largest counts as less than ``floor`` of all's.
    """
    largest = {name: _largest(mine[name]) for name in mine}
    unit = floor * max(largest.values(), default=0.0)
    gaps = dict.fromkeys({*mine, *theirs}, math.inf)
    for name in mine.keys() & theirs.keys():
        gaps[name] = _ratio(_largest(theirs[name] - mine[name]), max(largest[name], unit))
    return gaps


def parameter_gap(
    start: Tensor, mine: Tensor, theirs: Tensor, weak: Tensor, tolerance: Tolerance
) -> tuple[float, int]:
    """Returns how far a parameter is apart, and how many of its weak numbers drifted.

    The largest difference of numbers that are not weak, relative to how far the tensor's moved;
    and the count of weak ones (rounding alone may have driven them) beyond the tolerance.
    """
    moved = _largest(mine - start)
    apart = (theirs - mine).abs()
    drifted = int((weak & (apart > tolerance.parameter * moved)).sum())
    return _ratio(_largest(apart[~weak]), moved), drifted


def _loss_gap(mine: list[float], theirs: list[float]) -> float:
    if len(mine) != len(theirs):
        return math.inf
    unit = max((abs(value) for value in mine if math.isfinite(value)), default=0.0)
    gaps = [
        0.0 if math.isnan(a) and math.isnan(b) else _ratio(abs(a - b), unit)
        for a, b in zip(mine, theirs, strict=True)
    ]
    return max(gaps, default=0.0)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _ratio(apart: float, unit: float) -> float:
    if apart == 0:
        return 0.0
    return apart / unit if unit > 0 and math.isfinite(apart) else math.inf
