"""Few points for many, such that the eye sees what it would have seen."""

import math
from collections.abc import Sequence
from typing import Any

#: As many points as a chart has pixels, about.
MOST = 800


def thinned(steps: Sequence[float], values: Sequence[float], most: int = MOST) -> dict[str, Any]:
    """Returns at most ``most`` points of a curve, as JSON values.

    ``step`` and ``value``; where points were put together, ``value`` is the mean of each group
    (of as many points, but for the last), ``step`` that of its last, and ``least`` and ``most``
    say between which the group's lie. ``of`` is how many points there were. What is not finite is
    None, and counted in ``not_finite``, with the steps at which it was in ``where``.
    """
    bad = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
    curve: dict[str, Any] = {"of": len(values)}
    if bad:
        curve |= {"not_finite": len(bad), "where": bad[:most]}
    if len(values) <= most:
        told = [_short(value) if math.isfinite(value) else None for value in values]
        return curve | {"step": list(steps), "value": told}
    size = -(-len(values) // most)
    means, least, greatest = [], [], []
    for at in range(0, len(values), size):
        group = [value for value in values[at : at + size] if math.isfinite(value)]
        means.append(_short(math.fsum(group) / len(group)) if group else None)
        least.append(_short(min(group)) if group else None)
        greatest.append(_short(max(group)) if group else None)
    last = [steps[min(at + size, len(steps)) - 1] for at in range(0, len(steps), size)]
    return curve | {
        "step": last,
        "value": means,
        "least": least,
        "most": greatest,
        "together": size,
    }


def _short(value: float) -> float:
    """Returns six digits of it, which is more than a screen shows."""
    return float(f"{value:.6g}")
