"""Pictures of a comparison: differences with their intervals, and all curves below."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dtrain.errors import ConfigError
from dtrain.studies.table import Curves, Table
from dtrain.studies.words import signed

if TYPE_CHECKING:  # an extra
    from matplotlib.figure import Figure

_DASHES = ("-", "--", "-.", ":")
_LEVELS = "▁▂▃▄▅▆▇█"
_PLAIN_LEVELS = "_.-=+*#@"
_UNICODE, _ASCII = ("├", "─", "●", "┤", "┊"), ("[", "-", "o", "]", ":")


def draw(table: Table) -> "Figure":
    """Returns a Matplotlib figure; ConfigError where Matplotlib is missing.

    Above, a line for each variant: its difference to the base, the interval, each seed's own
    difference as a small mark. Below, the metric over the steps, a line for each run.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a picture needs Matplotlib: pip install 'dtrain[ablate]'") from error
    compared = [row for row in table.rows if row["verdict"] != "base"]
    height = 1.6 + 0.32 * len(compared)
    figure = Figure(figsize=(9, height + 4), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(height, 4))
    _draw_differences(above, table, compared)
    _draw_curves(below, table)
    return figure


def _draw_differences(axes: Any, table: Table, compared: Sequence[dict[str, Any]]) -> None:
    axes.axvline(0, color="0.5", linewidth=1)
    for place, row in enumerate(compared):
        middle, color = row["difference"], _color(row)
        if middle is None:
            axes.text(0, place, f"  {row['error'][:80] or row['verdict']}", va="center", fontsize=8)
            continue
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=color, linewidth=2)
        axes.plot([middle], [place], "o" if _matters(row) else "D", color=color, markersize=7)
        if not _matters(row):
            axes.plot([middle], [place], "D", color="white", markersize=3.5)
    axes.set_yticks(range(len(compared)), [row["variant"] for row in compared])
    axes.set_ylim(len(compared) - 0.5, -0.5)
    side = "right" if table.pick.mode == "max" else "left"
    axes.set_xlabel(f"difference of {table.pick.metric} to {table.base} (better to the {side})")
    axes.set_title(table.heading, loc="left", fontsize=10)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)


def _draw_curves(axes: Any, table: Table) -> None:
    colors = [f"C{number % 10}" for number in range(len(table.curves))]
    for number, (one, color) in enumerate(zip(table.curves, colors, strict=True)):
        is_base = one.variant == table.base
        style = {"color": "black" if is_base else color, "linewidth": 1.8 if is_base else 1.0}
        style |= {"linestyle": _DASHES[number // 10 % 4], "zorder": 3 if is_base else 2}
        label = one.variant
        for line in one.lines:
            points = [(step, value) for step, value in line if math.isfinite(value)]
            if points:
                axes.plot(*zip(*points, strict=True), alpha=0.7, label=label, **style)
                label = "_"  # once in the legend
    axes.set_xlabel("step")
    axes.set_ylabel(table.pick.metric)
    if any(one.lines for one in table.curves):
        axes.legend(fontsize=8, ncols=1 + len(table.curves) // 12)
    axes.grid(color="0.9")


def _color(row: dict[str, Any]) -> str:
    return {"better": "C2", "worse": "C3"}.get(row["verdict"], "0.35")


def _matters(row: dict[str, Any]) -> bool:
    return row["verdict"] in ("better", "worse")


def draw_in_terminal(table: Table, width: int = 100, *, ascii_only: bool = False) -> str:
    """Returns the same in characters: intervals around zero, and the mean curve of each variant."""
    marks = _ASCII if ascii_only else _UNICODE
    names = max((len(row["variant"]) for row in table.rows), default=0)
    room = max(20, width - names - 4)
    rows = [row for row in table.rows if row["difference"] is not None]
    ends = [row[key] for row in rows for key in ("low", "high", "difference")]
    ends = [end for end in ends if end is not None and math.isfinite(end)]
    lines = []
    if ends and any(ends):
        low, high = min(0.0, *ends), max(0.0, *ends)

        def place(value: float) -> int:
            return int(round((value - low) / (high - low) * (room - 1)))  # noqa: RUF046

        for row in rows:
            cells = [" "] * room
            cells[place(0)] = marks[4]
            if row["low"] is not None:
                first, last = place(row["low"]), place(row["high"])
                cells[first : last + 1] = marks[1] * (last - first + 1)
                cells[first], cells[last] = marks[0], marks[3]
            cells[place(row["difference"])] = marks[2]
            lines.append(f"{row['variant'].rjust(names)}  {''.join(cells).rstrip()}")
        size = (high - low) / 20
        left, right = signed(low, size), signed(high, size)
        side = "right" if table.pick.mode == "max" else "left"
        about = f"difference to {table.base}, better to the {side}"
        lines.append(" " * (names + 2) + f"{left}  {about}  {right}".center(room).rstrip())
        lines.append("")
    return "\n".join([*lines, *_curves_in_terminal(table.curves, names, room, ascii_only)])


def _curves_in_terminal(
    curves: Sequence[Curves], names: int, room: int, ascii_only: bool
) -> list[str]:
    """Returns each run's curve as a row of levels, the seeds of a variant below one another."""
    levels = _PLAIN_LEVELS if ascii_only else _LEVELS
    points = [p for one in curves for line in one.lines for p in line if math.isfinite(p[1])]
    if not points:
        return []
    last = max(step for step, _ in points)
    # What diverged, or has only begun, would flatten all the rest.
    values = sorted(value for _, value in points)
    low, high = values[len(values) // 20], values[-1 - len(values) // 10]
    count = min(room - 24, 60)
    drawn = []
    for one in curves:
        name = one.variant
        for line in one.lines:
            text = ""
            for cell in range(count):
                upto = [value for step, value in line if step <= last * (cell + 1) / count]
                if not upto or not math.isfinite(upto[-1]):
                    text += " " if not upto else "?"
                else:
                    part = (upto[-1] - low) / (high - low) if high > low else 0.0
                    text += levels[max(0, min(7, int(part * 8)))]
            if text.strip():
                drawn.append(f"{name.rjust(names)}  {text}  {line[-1][1]:.4g}")
                name = ""
    bounds = f"from {low:.4g} or less (lowest) to {high:.4g} or more (highest), {last:g} steps"
    return [*drawn, " " * (names + 2) + bounds]
