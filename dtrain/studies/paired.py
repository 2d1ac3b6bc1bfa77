"""Differences of pairs, how sure they are, and how many pairs would see what."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from dtrain.errors import ConfigError

ALPHA, POWER = 0.05, 0.8
_MOST_SEEDS = 1000
_QUANTILES = 1000
_MOST_PARTS = 16  # of the smallest gap: a finer grid than that hides nothing

Pairs = Sequence[tuple[float, float]]  # (base, variant), each of one seed


@dataclass(frozen=True, slots=True)
class Difference:
    """What a variant does, over the seeds that it has in common with the base."""

    count: int  # of pairs
    mean: float  # of variant less base
    sd: float  # of the differences
    low: float  # of the interval around the mean
    high: float
    p: float  # by itself
    p_holm: float  # beside the other variants
    significant: bool
    detectable: float  # the difference that so many pairs see in 80 % of studies
    seeds_for_half: int | None  # how many would see half of that; None for over a thousand


def differences(pairs: Mapping[str, Pairs]) -> dict[str, Difference]:
    """Compares each variant with the base by a paired t test, all of them by Holm's method.

    Those with fewer than two pairs, or without any difference, are left out: they are no tests.

    Intervals are of the level at which Holm's method decided: 1 - 0.05 / (m - k) for the k-th
    smallest p of m (from 0), and for all after the first that is not significant, that one's. So an
    interval leaves zero out exactly where the difference is significant.

    Metrics such as accuracies lie on a grid, and few differences may be equal by chance: so the
    standard deviation is taken as no less than that of rounding to the grid, its step / sqrt(6) for
    a difference (Sheppard: step^2 / 12 for each of both).

    Sources: S. Holm, "A simple sequentially rejective multiple test procedure" (1979); J. Cohen,
    "Statistical power analysis for the behavioral sciences" (1988).
    """
    stats = scipy_stats()
    found: dict[str, tuple[int, float, float, float]] = {}
    for name, ones in pairs.items():
        deltas = [variant - base for base, variant in ones]
        count = len(deltas)
        if count < 2 or not any(deltas):
            continue
        mean = math.fsum(deltas) / count
        sd = math.hypot(*(one - mean for one in deltas)) / math.sqrt(count - 1)
        sd = max(sd, grid([value for pair in ones for value in pair]) / math.sqrt(6))
        p = float(2 * stats.t.sf(abs(mean) / (sd / math.sqrt(count)), count - 1))
        found[name] = count, mean, sd, p
    result: dict[str, Difference] = {}
    level, p_holm, decided = ALPHA, 0.0, True
    for place, name in enumerate(sorted(found, key=lambda one: found[one][3])):
        count, mean, sd, p = found[name]
        left = len(found) - place
        if decided:
            level = ALPHA / left
            decided = p < level
        p_holm = min(1.0, max(p_holm, left * p))
        half = float(stats.t.isf(level / 2, count - 1)) * sd / math.sqrt(count)
        seen = detectable(sd, count, level)
        more = seeds_for(seen / 2, sd, level)
        result[name] = Difference(
            count, mean, sd, mean - half, mean + half, p, p_holm, decided, seen, more
        )
    return result


def grid(values: Sequence[float]) -> float:
    """Returns the step of the grid on which values lie; almost nothing where they lie on none.

    All gaps must be multiples of the step, which is the smallest gap or a fraction of it. Were it
    the smallest gap of any values, differences that are alike in all seeds would never be seen.
    """
    ordered = sorted({*values})
    scale = max(map(abs, ordered), default=0.0)
    near = 1e-6 * scale  # what is closer differs by the rounding of float32
    gaps = [gap for a, b in pairwise(ordered) if (gap := b - a) > near]
    for parts in range(1, _MOST_PARTS + 1) if gaps else ():
        step = min(gaps) / parts
        counts = [round(gap / step) for gap in gaps]
        # The step has an error of its own, and so many steps have so many of them.
        if all(
            abs(gap - count * step) <= min(near * (1 + count / 4), step / 8)
            for gap, count in zip(gaps, counts, strict=True)
        ):
            return step
    return 1e-9 * scale


def power(difference: float, sd: float, count: int, level: float) -> float:
    """Returns how often so many pairs would see a difference of that size.

    That is the noncentral t, as a mean over what its standard deviation may come to: SciPy's own
    is NaN for few pairs at small levels.
    """
    norm = scipy_stats().norm
    critical = float(scipy_stats().t.isf(level / 2, count - 1)) * _seen_sds(count)
    shift = difference / sd * math.sqrt(count)
    return float((norm.sf(critical - shift) + norm.cdf(-critical - shift)).mean())


@lru_cache
def _seen_sds(count: int) -> Any:
    """Returns equally likely standard deviations of so many values, of which the true one is 1."""
    shares = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    return np.sqrt(scipy_stats().chi2.ppf(shares, count - 1) / (count - 1))


def detectable(sd: float, count: int, level: float) -> float:
    """Returns the smallest difference that so many pairs see in 80 % of studies."""
    low, high = 0.0, sd
    while power(high, sd, count, level) < POWER:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        if power(middle, sd, count, level) < POWER:
            low = middle
        else:
            high = middle
    return high


def seeds_for(difference: float, sd: float, level: float) -> int | None:
    """Returns how many pairs see a difference in 80 % of studies; None for over a thousand."""
    low, high = 1, 2
    while power(difference, sd, high, level) < POWER:
        low, high = high, 2 * high
        if low >= _MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if power(difference, sd, middle, level) < POWER:
            low = middle
        else:
            high = middle
    return high


def scipy_stats() -> Any:
    """Returns ``scipy.stats``; ConfigError where SciPy is missing."""
    try:
        from scipy import stats
    except ImportError as error:
        raise ConfigError(
            "comparing runs needs SciPy and Matplotlib: pip install 'dtrain[ablate]'"
        ) from error
    return stats
