"""Where a drilled run is not what the undisturbed one was, and which comes first."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from dtrain.trials.drill_record import DrilledRun

#: Law 1: the relative distance of norms that rounding may bring between world sizes.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}
_COARSE = 1e-2  # bfloat16 and float16
_END = math.inf


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

    The samples of each global batch must be the same, in the same order; parameters and buffers
    within law 1's tolerance, as the relative distance of their norms.
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
    expected = reference.starts[0].batches()
    seen: set[int] = set()
    for number, start in enumerate(drilled.starts):
        for step, ranks in start.batches().items():
            seen.add(step)
            shares = expected.get(step, [])
            # Ranks' shares lie one after the other, so this is the global batch in its order.
            mine, theirs = ([one for rank in each for one in rank] for each in (shares, ranks))
            pairs = enumerate(zip_longest(mine, theirs))
            wrong = next((place for place, (a, b) in pairs if a != b), None)
            if wrong is None and not together and [*map(len, shares)] != [*map(len, ranks)]:
                wrong = 0
            if wrong is not None:
                strange = len({*theirs} - {*mine})
                words = (
                    f"step {step + 1} consumed other samples{_again(number)}: the first that "
                    f"differs is number {wrong + 1} of the global batch of {len(mine)}, and "
                    f"{strange} are not of this step at all"
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
    a, b = (one.contiguous().reshape(-1, 1).view(torch.uint8) for one in (mine, theirs))
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
