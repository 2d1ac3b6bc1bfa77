"""What a variant comes to, in a word and in a sentence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from dtrain.studies.paired import Difference, Pairs
from dtrain.studies.pick import Pick
from dtrain.studies.run import Run
from dtrain.studies.words import cut, plain, size

Verdict = Literal[
    "better",
    "worse",
    "negligible",
    "no difference seen",
    "identical",
    "one seed",
    "breaks",
    "no pairs",
    "no runs",
]
#: A difference below this part of the spread between the base's seeds is real, but hardly matters.
_SMALL = 0.1

Values = Mapping[tuple[str, int], float | None]  # by variant and seed, of runs that finished


@dataclass(frozen=True, slots=True)
class Facts:
    """What all variants are judged by."""

    pick: Pick
    share: bool  # the metric is told in points of a hundred
    spread: float | None  # of the base
    base: Sequence[Run]
    values: Values
    alike: bool = True  # the variant has the base's losses, in all seeds that both have


def judge(
    row: Mapping[str, Any], pairs: Pairs, difference: Difference | None, facts: Facts
) -> dict[str, Any]:
    """Returns what a variant's row gets: the difference, the verdict and the sentence."""
    deltas = [variant - base for base, variant in pairs]
    found: dict[str, Any] = {"pairs": len(deltas)}
    if deltas:
        found["difference"] = fmean(deltas)
    if difference is not None:
        found |= {"low": difference.low, "high": difference.high}
        found |= {"p": difference.p, "p_holm": difference.p_holm}
    if not deltas:
        verdict, words = _without_pairs(row, facts)
    elif not (any(deltas) or facts.alike):
        verdict = "no difference seen"
        words = (
            f"the same {facts.pick.metric} in {len(deltas)} of {len(deltas)} seeds, but not the "
            "same losses: that metric is too coarse to tell them apart here"
        )
    elif not any(deltas):
        verdict = "identical"
        words = (
            f"the same {facts.pick.metric} in {len(deltas)} of {len(deltas)} seeds, to the last "
            "bit: what was changed has no effect on it here"
        )
    elif difference is None:
        verdict, words = "one seed", size(deltas[0], deltas[0], facts.pick, facts.share)
        words += "; one seed shows nothing: ask for 3 or more"
    elif difference.significant:
        verdict, words = _seen(deltas, difference, facts)
    else:
        verdict, words = "no difference seen", _unseen(difference, facts.share)
    lost = _lost(row, bool(deltas), facts) if row["diverged"] or row["failed"] else ""
    return found | {"verdict": verdict, "sentence": f"{row['variant']}: {lost}{words}"}


def _without_pairs(row: Mapping[str, Any], facts: Facts) -> tuple[Verdict, str]:
    """Says why there is nothing to compare."""
    runs, base = row["runs"], [run for run in facts.base if run.state != "unfinished"]
    lost = row["diverged"] + row["failed"]
    if not runs:
        return "no runs", "no run has come to its end yet"
    if lost == runs and not all(is_lost(run, facts.values) for run in base):
        few = runs < 3 or any(is_lost(run, facts.values) for run in base)
        return "breaks", "nothing is left to compare" if few else "it breaks the training"
    if lost:
        return "no pairs", "nothing is left to compare"
    if not row["finished"]:
        return "no pairs", f"no value of {facts.pick.metric} to compare"
    if all(facts.values.get((run.variant, run.seed)) is None for run in base):
        return "no pairs", "the base has no value to compare with"
    if all(is_lost(run, facts.values) for run in base):
        return "no pairs", "the base diverged or failed in all seeds, so nothing can be compared"
    return "no pairs", "there is no seed in which both it and the base have a value"


def _seen(deltas: Sequence[float], difference: Difference, facts: Facts) -> tuple[Verdict, str]:
    """Says how large a difference is that is not due to chance."""
    agreeing = sum((delta > 0) == (difference.mean > 0) for delta in deltas if delta)
    ends = sorted(abs(one) for one in (difference.low, difference.high))
    scale = (difference.high - difference.low) / 2
    between = " to ".join(plain(one, scale, facts.share) for one in ends)
    words = (
        f"{size(difference.mean, scale, facts.pick, facts.share)} ({between}), in {agreeing} of "
        f"{len(deltas)} seeds: "
    )
    if facts.spread is not None and abs(difference.mean) < _SMALL * facts.spread:
        return "negligible", words + "real, but small beside the spread between seeds"
    better = (difference.mean > 0) == (facts.pick.mode == "max")
    return "better" if better else "worse", words + "it matters"


def _unseen(difference: Difference, share: bool) -> str:
    """Says how large a difference would have been seen, and how many seeds see a smaller one."""
    seen, more = difference.detectable, difference.seeds_for_half
    about = "more than 1000" if more is None else f"about {more}"
    return (
        f"no difference seen; {difference.count} seeds could have seen one of "
        f"{plain(seen, seen, share)}{' points' if share else ''}; {about} would see "
        f"{plain(seen / 2, seen / 2, share)}"
    )


def _lost(row: Mapping[str, Any], is_compared: bool, facts: Facts) -> str:
    """Says how many runs diverged or failed, and of the base, before what the others come to."""
    parts = [f"{what} in {row[what]} of {row['runs']} seeds" for what in ("diverged", "failed")]
    parts = [part for part, what in zip(parts, ("diverged", "failed"), strict=True) if row[what]]
    of_base = sum(is_lost(run, facts.values) for run in facts.base)
    words = f"{' and '.join(parts)}, the base in {of_base or 'none'}"
    if row["error"]:
        words += f" ({cut(row['error'])})"
    return words + ("; where both ended, " if is_compared else "; ")


def is_lost(run: Run, values: Values) -> bool:
    """Says whether a run failed, or came to its end with a number that is none."""
    value = values.get((run.variant, run.seed))
    return run.state == "failed" or (value is not None and not math.isfinite(value))
