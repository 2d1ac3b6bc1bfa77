"""The same picture in characters."""

import math

from dtrain.studies.table import Curves, Table
from dtrain.studies.window import ends, far_off, short, span_of_curves, span_of_differences
from dtrain.studies.words import number, signed

_LEVELS, _PLAIN_LEVELS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_UNICODE, _ASCII = ("├", "─", "●", "┤", "┊", "○"), ("[", "-", "X", "]", ":", "o")


def draw_in_terminal(table: Table, width: int = 100, *, ascii_only: bool = False) -> str:
    """Returns a comparison in characters: intervals around zero, and each variant's mean curve."""
    names = max((len(short(row["variant"])) for row in table.rows), default=0)
    room = max(20, width - names - 2)
    lines = _differences(table, names, room, _ASCII if ascii_only else _UNICODE)
    lines += _curves(table, names, room, _PLAIN_LEVELS if ascii_only else _LEVELS)
    return "\n".join(lines)


def _differences(table: Table, names: int, room: int, marks: tuple[str, ...]) -> list[str]:
    low, high = span_of_differences(table)
    if low == high:
        return []
    far, lines = far_off(table), []

    def place(value: float) -> int:
        return int(round((value - low) / (high - low) * (room - 1)))  # noqa: RUF046

    for row in table.rows:
        if not (reach := ends(row)):
            continue
        cells = [" "] * room
        cells[place(0)] = marks[4]
        if row["variant"] in far:
            words = f"{signed(row['difference'], row['difference'])}, far off"
            is_left = row["difference"] < 0
            words = f"< {words}" if is_left else f"{words} >"
            start = 0 if is_left else room - len(words)
            cells[start : start + len(words)] = words
        else:
            first, last = place(min(reach)), place(max(reach))
            if first < last:
                cells[first : last + 1] = marks[1] * (last - first + 1)
                cells[first], cells[last] = marks[0], marks[3]
                if first < place(0) < last:
                    cells[place(0)] = marks[4]
            matters = row["verdict"] in ("better", "worse")
            cells[place(row["difference"])] = marks[2] if matters else marks[5]
        lines.append(f"{short(row['variant']).rjust(names)}  {''.join(cells).rstrip()}")
    size = (high - low) / 20
    left, right = signed(low, size) if low else "0", signed(high, size) if high else "0"
    side = "right" if table.pick.mode == "max" else "left"
    gap = room - len(left) - len(right)
    about = f"better to the {side}"
    if len(more := f"{about}; {marks[2]} matters") + 2 <= gap:
        about = more
    if len(more := f"difference to {short(table.base)}, {about}") + 2 <= gap:
        about = more
    lines.append(" " * (names + 2) + left + about[: max(0, gap - 2)].center(gap) + right)
    return [*lines, ""]


def _curves(table: Table, names: int, room: int, levels: str) -> list[str]:
    if (span := span_of_curves(table)) is None:
        return []
    low, high = span
    last = max(line[-1][0] for one in table.curves for line in one.lines if line)
    count = max(8, min(room - 32, 60))
    lines = []
    for one in table.curves:
        values = [_at(one, last * (cell + 1) / count) for cell in range(count)]
        if not any(values):
            continue
        text = "".join(_level(ones, low, high, levels) for ones in values)
        lines.append(
            f"{short(one.variant).rjust(names)}  {text}  {_in_words(values[-1], (high - low) / 10)}"
        )
    scale = (high - low) / 10
    low_words, high_words = number(low, scale), number(high, scale)
    about = f"{levels[0]} {low_words} or less, {levels[-1]} {high_words} or more"
    lines.append(f"mean over seeds: {about}; {last:g} steps; ? not a number")
    return lines


def _at(one: Curves, step: float) -> list[float]:
    """Returns the value of each seed at a step: the last one until there."""
    upto = [[value for at, value in line if at <= step] for line in one.lines]
    return [values[-1] for values in upto if values]


def _level(values: list[float], low: float, high: float, levels: str) -> str:
    if not values:
        return " "
    if not all(map(math.isfinite, values)):
        return "?"
    mean = math.fsum(values) / len(values)
    part = (mean - low) / (high - low) if high > low else 0.5
    return levels[max(0, min(len(levels) - 1, int(part * len(levels))))]


def _in_words(values: list[float], scale: float) -> str:
    finite = [value for value in values if math.isfinite(value)]
    bad = f"{len(values) - len(finite)} not a number" if len(finite) < len(values) else ""
    if not finite:
        return bad
    words = number(math.fsum(finite) / len(finite), scale)
    if len(finite) > 1:
        words += f" ({number(min(finite), scale)} to {number(max(finite), scale)})"
    return f"{words}, {bad}" if bad else words
