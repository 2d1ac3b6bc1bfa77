"""What a drilled training leaves behind, and where it is not what the undisturbed one was."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.checkpoint import find_checkpoint, load_state, load_tensors
from dtrain.distributed import raw_bytes
from dtrain.errors import CheckError
from dtrain.trials.records import events

#: Law 1: the relative distance of norms that rounding may bring between world sizes.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}
_COARSE = 1e-2  # bfloat16 and float16
_END = math.inf

#: Of a checkpoint's state: what a resumed run must end with, as one that was left alone.
_KEPT = ("progress", "optimizer", "precision", "callbacks", "shared_rng")


@dataclass(slots=True)
class RankRecord:
    """What one rank told in one start."""

    began_at: int | None = None  # the step it went on from; None if it did not come that far
    samples: dict[int, list[str]] = field(default_factory=dict)  # by step, a digest of each
    #: The same as rows of the dataset; None for a stream.
    rows: dict[int, list[int] | None] = field(default_factory=dict)
    #: Rank 0's figures, by kind, step, and how many of that kind came before at that step.
    reports: dict[tuple[str, int, int], dict[str, float]] = field(default_factory=dict)
    disturbed: str = ""  # what befell it here, in words
    preempted: bool = False  # fit returned, and the run is to be continued
    ended: bool = False  # fit returned
    #: What the script asked for: run_dir, checkpoint, stream, never_resumes.
    facts: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, rank: int) -> "RankRecord":
        record = cls()
        for event in events(folder, rank):
            match event:
                case {"event": "facts", "facts": facts}:
                    record.facts |= facts
                case {"event": "began", "step": step}:
                    record.began_at = step
                case {"event": "step", "step": step, "samples": samples, **more}:
                    record.samples[step] = samples
                    record.rows[step] = more.get("rows")
                case {"event": "report", "kind": kind, "step": step, "values": values}:
                    before = [key for key in record.reports if key[:2] == (kind, step)]
                    record.reports[kind, step, len(before)] = values
                case {"event": "disturbed", "what": what}:
                    record.disturbed = what
                case {"event": "ended", "preempted": preempted}:
                    record.ended, record.preempted = True, preempted
        return record


@dataclass(frozen=True, slots=True)
class StartRecord:
    """What all ranks told in one start."""

    ranks: tuple[RankRecord, ...]

    @classmethod
    def read(cls, folder: Path, ranks: int) -> "StartRecord":
        return cls(tuple(RankRecord.read(folder, rank) for rank in range(ranks)))

    @property
    def main(self) -> RankRecord:
        return self.ranks[0]

    @property
    def disturbed(self) -> str:
        """What befell it, in words; empty if nothing did."""
        return next((rank.disturbed for rank in self.ranks if rank.disturbed), "")

    @property
    def finished(self) -> bool:
        """The training is done: no other start is needed."""
        return all(rank.ended and not rank.preempted for rank in self.ranks)

    @property
    def preempted(self) -> bool:
        """All ranks left in order, to be started again."""
        return all(rank.preempted for rank in self.ranks)

    def batches(self, *, by_row: bool = False) -> dict[int, list[Sequence[object]]]:
        """Returns for each step that all ranks have done, each rank's samples.

        By their rows, what they came as does not count: padding depends on who is in a batch.
        """
        done = set.intersection(*({*rank.samples} for rank in self.ranks))
        return {
            step: [(by_row and rank.rows.get(step)) or rank.samples[step] for rank in self.ranks]
            for step in sorted(done)
        }


@dataclass(frozen=True, slots=True)
class LastCheckpoint:
    """What a run's newest checkpoint holds."""

    step: int  # after which it was made
    model: dict[str, Tensor]  # parameters and buffers
    state: dict[str, Any]  # the rest, flat: from optimizer/state/0/exp_avg, say, to its value

    @classmethod
    def read(cls, run_dir: Path) -> "LastCheckpoint":
        """Reads the newest intact checkpoint of a run; raises CheckError if there is none."""
        saved, damage = find_checkpoint(run_dir / "checkpoints")
        if saved is None:
            words = ["the training came to its end and left no intact checkpoint", *damage]
            raise CheckError("; ".join(words))
        state = load_state(saved.path)
        kept = {name: state[name] for name in _KEPT}
        return cls(saved.step, load_tensors(saved.path), dict(_leaves(kept, "")))


@dataclass(frozen=True, slots=True)
class DrilledRun:
    """One training, from its first start to its end."""

    starts: tuple[StartRecord, ...]  # all but the last ended early
    final: LastCheckpoint


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it was undisturbed."""

    what: str  # samples, metric, model or state
    name: str  # of a metric, a tensor, a path in the state
    step: float  # the first step that shows it, from 1; infinite for what the run ended with
    words: str  # what is there, and what was there undisturbed


def compare(reference: DrilledRun, drilled: DrilledRun) -> list[Difference]:
    """Compares to the bit, on the same number of ranks; what comes first in time is first.

    Steps that were taken twice must have been the same both times.
    """
    found = [
        *_samples(reference, drilled, together=False),
        *_metrics(reference, drilled),
        *_steps(reference, drilled),
        *_last("model", reference.final.model, drilled.final.model),
        *_last("state", reference.final.state, drilled.final.state),
    ]
    return sorted(found, key=lambda one: one.step)  # stable: causes before effects


def compare_resized(reference: DrilledRun, drilled: DrilledRun) -> list[Difference]:
    """Compares where the run went on with another number of ranks.

    The samples of each global batch must be the same, in order; parameters and buffers within
    law 1's tolerance, as the relative distance of their norms.
    """
    found = list(_samples(reference, drilled, together=True))
    if steps := list(_steps(reference, drilled)):
        return found + steps
    mine, theirs = reference.final.model, drilled.final.model
    apart = {name: float((mine[name].double() - theirs[name].double()).norm()) for name in mine}
    size = math.sqrt(sum(float(t.double().square().sum()) for t in mine.values()))
    gap = math.sqrt(sum(value**2 for value in apart.values())) / (size or 1.0)
    tolerance = tolerance_of(mine)
    if not gap <= tolerance:
        worst = max(apart, key=lambda name: apart[name])
        words = (
            f"parameters and buffers are apart by {gap:.1e} of their norm, more than {tolerance:g};"
            f" most of it in {worst}"
        )
        found.append(Difference("model", worst, _END, words))
    return found


def tolerance_of(model: Mapping[str, Tensor]) -> float:
    """Returns law 1's tolerance for the coarsest dtype among a model's floating tensors."""
    floating = [t.dtype for t in model.values() if t.is_floating_point()]
    return max((TOLERANCES.get(dtype, _COARSE) for dtype in floating), default=0.0)


def _samples(reference: DrilledRun, drilled: DrilledRun, *, together: bool) -> Iterator[Difference]:
    expected = reference.starts[0].batches(by_row=together)
    rows = reference.starts[0].batches(by_row=True)
    seen: set[int] = set()
    for number, start in enumerate(drilled.starts):
        for step, ranks in start.batches(by_row=together).items():
            seen.add(step)
            shares = expected.get(step, [])
            # Ranks' shares lie one after the other, so this is the global batch in its order.
            mine, theirs = ([one for rank in each for one in rank] for each in (shares, ranks))
            pairs = enumerate(zip_longest(mine, theirs))
            wrong = next((place for place, (a, b) in pairs if a != b), None)
            if wrong is None and not together and [*map(len, shares)] != [*map(len, ranks)]:
                wrong = 0
            if wrong is not None:
                at = f"number {wrong + 1} of the global batch of {len(mine)}"
                if rows.get(step) == start.batches(by_row=True)[step]:
                    words = (
                        f"step {step + 1} consumed the same samples{_again(number)}, but what they "
                        f"hold differs, first in {at}: random numbers of the dataset, say"
                    )
                else:
                    words = (
                        f"step {step + 1} consumed other samples{_again(number)}: the first that "
                        f"differs is {at}, and {len({*theirs} - {*mine})} are not of this step at "
                        "all"
                    )
                yield Difference("samples", "samples", step + 1, words)
    for step in sorted({*expected} - seen):
        yield Difference("samples", "samples", step + 1, f"step {step + 1} was never done")


def _metrics(reference: DrilledRun, drilled: DrilledRun) -> Iterator[Difference]:
    expected = reference.starts[0].main.reports
    seen = set()
    for number, start in enumerate(drilled.starts):
        for key, values in start.main.reports.items():
            seen.add(key)
            wanted = expected.get(key, {})
            for name in sorted({*values, *wanted}):
                mine, theirs = wanted.get(name), values.get(name)
                if not _same(mine, theirs):
                    words = (
                        f"{name} of the {key[0]} report at step {key[1]} is "
                        f"{_number(theirs)}{_again(number)}; undisturbed it is {_number(mine)}"
                    )
                    if mine is not None and theirs is not None:
                        words += f" (off by {abs(theirs - mine):.1e})"
                    yield Difference("metric", name, key[1], words)
    for kind, step, place in sorted({*expected} - seen):
        for name in expected[kind, step, place]:
            words = f"{name} of the {kind} report at step {step} was never reported"
            yield Difference("metric", name, step, words)


def _steps(reference: DrilledRun, drilled: DrilledRun) -> Iterator[Difference]:
    mine, theirs = reference.final.step, drilled.final.step
    if mine != theirs:
        words = f"the last checkpoint is of step {theirs}; undisturbed it is of step {mine}"
        yield Difference("model", "step", _END, words)


def _last(what: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Difference]:
    for name in dict.fromkeys([*mine, *theirs]):
        if name not in theirs:
            yield Difference(what, name, _END, f"{name} is not there")
        elif name not in mine:
            yield Difference(what, name, _END, f"{name} is there; undisturbed it is not")
        elif words := _unequal(mine[name], theirs[name]):
            yield Difference(what, name, _END, f"{name} {words}")


def _unequal(mine: Any, theirs: Any) -> str:
    """Returns by how much two values differ, in words; nothing where they are equal to the bit."""
    if not (isinstance(mine, Tensor) and isinstance(theirs, Tensor)):
        return "" if _same(mine, theirs) else f"is {theirs!r}; undisturbed it is {mine!r}"
    if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
        there, here = (f"{one.dtype} {list(one.shape)}" for one in (mine, theirs))
        return f"is {here}; undisturbed it is {there}"
    # A row of bytes for each value.
    a, b = (raw_bytes(one).view(-1, one.element_size()) for one in (mine, theirs))
    if torch.equal(a, b):
        return ""
    count = int((a != b).any(1).sum())
    gap = float((mine.double() - theirs.double()).abs().max())
    return f"differs in {count} of {mine.numel()} values, by up to {gap:.1e}"


def _same(mine: Any, theirs: Any) -> bool:
    both_nan = mine != mine and theirs != theirs
    return bool(mine == theirs) or both_nan


def _number(value: float | None) -> str:
    return "not there" if value is None else f"{value:.9g}"


def _again(start: int) -> str:
    return f" after {start} restart{'s' * (start > 1)}" if start else " already before the kill"


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(below, f"{path}/{key}" if path else str(key))
    else:
        yield path, value
