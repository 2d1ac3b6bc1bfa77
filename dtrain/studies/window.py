"""What part of a comparison a picture shows: one variant far off must not flatten all others."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from dtrain.studies.table import Curves, Table
from dtrain.studies.words import cut

_FAR = 20  # so many times as far as the variants' median
_EARLY = 0.25  # of the steps: there curves fall from where all begin
_LONGEST = 32  # characters of a name


def short(name: str) -> str:
    """Returns a name as pictures have room for."""
    return cut(name, _LONGEST)


def far_off(table: Table) -> set[str]:
    """Returns the variants whose differences would leave no room for the others'."""
    reach = {
        row["variant"]: most
        for row in table.rows
        if (most := max(map(abs, ends(row)), default=0.0))
    }
    if len(reach) < 2:
        return set()
    most = _FAR * median(sorted(reach.values())[:-1])  # whatever the largest is
    return {name for name, far in reach.items() if far > most}


def ends(row: dict[str, Any]) -> list[float]:
    """Returns how far a row's interval goes; nothing where there is none to show."""
    found = [row[key] for key in ("low", "difference", "high")]
    return [end for end in found if end is not None and math.isfinite(end)]


def span_of_differences(table: Table) -> tuple[float, float]:
    """Returns what to show of the differences, zero included; (0, 0) where there is nothing."""
    far = far_off(table)
    shown = [end for row in table.rows if row["variant"] not in far for end in ends(row)]
    return min([0.0, *shown]), max([0.0, *shown])


def span_of_curves(table: Table) -> tuple[float, float] | None:
    """Returns what to show of the metric: all but what is far off, early, or rare."""
    far = far_off(table)
    last = max((line[-1][0] for line in _lines(table.curves)), default=0.0)
    for skipped, early in ((far, _EARLY * last), (set[str](), 0.0)):
        values = sorted(
            value
            for line in _lines([one for one in table.curves if one.variant not in skipped])
            for step, value in line
            if step >= early and math.isfinite(value)
        )
        if values:
            rare = len(values) // 100
            return values[rare], values[-1 - rare]
    return None


def _lines(curves: Sequence[Curves]) -> list[tuple[tuple[float, float], ...]]:
    return [line for one in curves for line in one.lines if line]
