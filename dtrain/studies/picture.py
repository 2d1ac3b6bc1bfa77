"""The picture of a comparison: differences with their intervals, and all curves below."""

import math
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dtrain.errors import ConfigError
from dtrain.studies.table import Curves, Table
from dtrain.studies.window import ends, far_off, short, span_of_curves, span_of_differences
from dtrain.studies.words import cut, signed

if TYPE_CHECKING:  # an extra
    from matplotlib.figure import Figure

_DASHES = ("-", "--", "-.", ":")


def make_ready() -> None:
    """Imports what a table and its picture need, in a thread, so that nobody waits for it later."""
    with suppress(ImportError):  # which is told where it is needed
        for name in ("scipy.stats", "matplotlib.figure", "matplotlib.backends.backend_agg"):
            import_module(name)


def draw(table: Table) -> "Figure":
    """Returns a Matplotlib figure; ConfigError where Matplotlib is missing.

    Above, a line for each variant: its difference to the base, the interval, each seed's own
    difference as a small mark. Below, the metric over the steps: a thin line for each run, a thick
    one for the mean over the seeds of a variant.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a picture needs Matplotlib: pip install 'dtrain[ablate]'") from error
    compared = [row for row in table.rows if row["verdict"] != "base"]
    above, below = 1.3 + 0.3 * len(compared), max(3.8, 0.6 + 0.2 * len(table.curves))
    figure = Figure(figsize=(10, above + below), layout="constrained")
    axes = figure.subplots(2, 1, height_ratios=(above, below))
    # A name between two dollars is no formula.
    with_names = {"parse_math": False}
    _draw_differences(axes[0], table, compared, with_names)
    _draw_curves(axes[1], table, with_names)
    return figure


def _draw_differences(
    axes: Any, table: Table, compared: Sequence[dict[str, Any]], text: dict[str, Any]
) -> None:
    far, deltas = far_off(table), {one.variant: one.differences for one in table.curves}
    low, high = span_of_differences(table)
    margin = 0.08 * (high - low) or 1.0
    axes.set_xlim(low - margin, high + margin)
    axes.axvline(0, color="0.4", linewidth=1)
    for place, row in enumerate(compared):
        color = {"better": "C2", "worse": "C3"}.get(row["verdict"], "0.35")
        if not (reach := ends(row)):
            diverged = f"diverged in {row['diverged']} of {row['runs']} seeds"
            why = cut(row["error"], 70) or (diverged if row["diverged"] else "")
            words = row["verdict"] + (f": {why}" if why else "")
            where = axes.get_yaxis_transform()
            axes.text(0.01, place, words, transform=where, va="center", fontsize=8, **text)
            continue
        if row["variant"] in far:
            _draw_far_off(axes, place, row["difference"], low, high, margin, color)
            continue
        axes.plot(
            reach[:: len(reach) - 1 or 1],
            [place] * len(reach[:: len(reach) - 1 or 1]),
            color=color,
            linewidth=2,
        )
        each = deltas[row["variant"]]
        axes.plot(each, [place] * len(each), "|", color=color, markersize=7, alpha=0.6)
        # Filled where it matters, in black and white too.
        fill = color if row["verdict"] in ("better", "worse") else "white"
        axes.plot([row["difference"]], [place], "o", color=color, markerfacecolor=fill)
    names = [short(row["variant"]) for row in compared]
    axes.set_yticks(range(len(compared)), names, **text)
    axes.set_ylim(max(1, len(compared)) - 0.5, -0.5)
    side = "right" if table.pick.mode == "max" else "left"
    about = f"difference of {table.pick.metric} to {table.base}, better to the {side}"
    axes.set_xlabel(f"{about} (filled: it matters)", **text)
    axes.set_title(cut(table.heading, 110), loc="left", fontsize=10, **text)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)


def _draw_far_off(
    axes: Any, place: int, difference: float, low: float, high: float, margin: float, color: str
) -> None:
    """Draws an arrow to where the others would have to be flattened for, and says how far."""
    sign = 1 if difference > 0 else -1
    edge = high + margin if difference > 0 else low - margin
    axes.annotate(
        f"  {signed(difference, difference)}, far off  ",
        xy=(edge, place),
        xytext=(edge - sign * 0.08 * (high - low + 2 * margin), place),
        arrowprops={"arrowstyle": "->", "color": color},
        ha="right" if difference > 0 else "left",
        va="center",
        fontsize=8,
        color=color,
    )


def _draw_curves(axes: Any, table: Table, text: dict[str, Any]) -> None:
    clipped: list[str] = []
    broken: list[str] = []
    span = span_of_curves(table)
    low, high = span or (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    for number, one in enumerate(table.curves):
        is_base = one.variant == table.base
        style: dict[str, Any] = {"color": "black" if is_base else f"C{(number - 1) % 10}"}
        style |= {"linestyle": _DASHES[number % 4], "zorder": 4 if is_base else 3}
        lines = []
        for whole in one.lines:
            if line := [point for point in whole if math.isfinite(point[1])]:
                lines.append(line)
                axes.plot(*zip(*line, strict=True), alpha=0.35, linewidth=0.7, label="_", **style)
            if line and len(line) < len(whole):
                axes.plot(*line[-1], "x", color=style["color"], zorder=5)
                broken.append(short(one.variant))
        if not lines:
            continue
        marker = {"marker": "."} if max(map(len, lines)) == 1 else {}
        middle = mean_curve(one)
        axes.plot(
            *(zip(*middle, strict=True) if middle else ((), ())),
            linewidth=2.2 if is_base else 1.5,
            label=short(one.variant).lstrip("_"),  # which would hide it from the legend
            **style,
            **marker,
        )
        if not all(low <= line[-1][1] <= high for line in lines):
            clipped.append(short(one.variant))
    axes.set_xlabel("step")
    axes.set_ylabel(table.pick.metric, **text)
    axes.grid(color="0.9")
    if span is None:
        return
    axes.set_ylim(low, high)
    words = [f"beyond what is shown: {', '.join(clipped)}"] * bool(clipped)
    words += [f"x: no longer a number ({', '.join(dict.fromkeys(broken))})"] * bool(broken)
    axes.set_title(cut("; ".join(words), 130), loc="left", fontsize=8, **text)
    legend = axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    for label in legend.get_texts():
        label.set_parse_math(False)


def mean_curve(one: Curves) -> list[tuple[float, float]]:
    """Returns the mean over seeds, at the steps at which all have a number."""
    found: dict[float, dict[int, float]] = {}
    for number, line in enumerate(one.lines):
        for step, value in line:
            found.setdefault(step, {})[number] = value
    count = sum(bool(line) for line in one.lines)
    rows = [(step, list(values.values())) for step, values in sorted(found.items())]
    return [
        (step, math.fsum(values) / count)
        for step, values in rows
        if len(values) == count and all(map(math.isfinite, values))
    ]
