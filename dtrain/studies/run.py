"""One run of a comparison, and the figures that it left in its folder."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dtrain.errors import ConfigError

_TEXTS = ("kind",)


@dataclass(frozen=True, slots=True)
class Run:
    """One variant with one seed."""

    variant: str
    seed: int
    state: Literal["finished", "failed", "unfinished"]
    rows: Sequence[Mapping[str, Any]] = ()  # as :func:`read_rows` gives them
    error: str = ""  # the first line of what a failed one raised
    step_s: float | None = None  # median seconds of a step
    memory: int | None = None  # bytes, the most
    start: str = ""  # digest of the weights that its training began with
    evaluated: Mapping[str, float] = field(default_factory=dict)  # by its last Trainer.evaluate
    path: Path | None = None


def losses_of(run: Run) -> dict[tuple[float, str], str]:
    """Returns all losses of a run, by step and name, as texts: not-a-number equals itself so."""
    return {
        (row["step"], name): repr(value)
        for row in run.rows
        for name, value in row.items()
        if name.endswith("loss") and "step" in row
    }


def ends_badly(run: Run) -> bool:
    """Says whether a run's last loss is not finite; its accuracy may be, and means nothing."""
    last: dict[str, float] = {}
    for row in run.rows:
        last |= {name: v for name, v in row.items() if name.endswith("loss")}
    return not all(map(math.isfinite, last.values()))


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the figures that a run's ``JSONLines`` or ``CSV`` left, one dict a report.

    ``seconds`` count on over restarts, which begin at 0 in the files (one whose first report took
    longer than all before it looks like none). ConfigError where a file is
    damaged; a last line that is not whole is left out.
    """
    rows: list[dict[str, Any]] = []
    if (file := run_dir / "metrics.jsonl").exists():
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line or "{}")
            except ValueError:
                if number < len(lines):
                    raise ConfigError(f"{file}, line {number} is damaged: {line[:60]!r}") from None
                continue
            if row and isinstance(row, dict):
                rows.append(_numbers(row))
    elif (file := run_dir / "metrics.csv").exists():
        text = file.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]  # a number that is cut short is another number
        rows = [_numbers(row) for row in csv.DictReader(io.StringIO(whole, newline=""))]
    before = last = 0.0
    for row in rows:
        seconds = row.get("seconds", last)
        if seconds < last:
            before += last
        last = seconds
        row["seconds"] = before + seconds
    return rows


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name in _TEXTS:
            found[name] = value
        elif name and value not in ("", None):
            try:
                found[name] = float(value)  # "nan" and "inf" are texts there
            except (TypeError, ValueError):
                continue
    return found
