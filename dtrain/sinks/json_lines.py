"""Writes a run's figures to a file, one JSON object a line."""

import json
import math
from typing import Any

from dtrain.sinks.row_file import RowFile
from dtrain.sinks.sink import OnError, Report


class JSONLines(RowFile):
    """Appends each ``train``, ``epoch`` and ``eval`` report to a file in the run's folder.

    A line has the keys ``step``, ``epoch`` (from 0), ``kind``, ``seconds`` and ``samples`` (both
    since ``fit`` began), then the report's values under their own names, and is on its way to the
    disk before the next report is taken. Numbers that are not finite, for which JSON has no word,
    are the strings ``"nan"``, ``"inf"`` and ``"-inf"``: ``float(row[name])`` reads any value.

    A run that is continued goes on in the same file. What an earlier start wrote about steps that
    are now taken again is dropped, as is a last line that a kill cut short.

    Args:
        filename: the file's name, within the run's folder.
        on_error: ``"raise"`` ends the run if it cannot be written; see :class:`~dtrain.Sink`.
    """

    def __init__(self, filename: str = "metrics.jsonl", *, on_error: OnError = "warn") -> None:
        super().__init__(filename, on_error)

    def _row(self, fixed: dict[str, Any], values: dict[str, float], report: Report) -> str:
        named = {name: v if math.isfinite(v) else str(v) for name, v in values.items()}
        row = fixed | named | fixed  # first in order, and not to be overwritten
        return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"

    def _upto(self, step: float) -> bytes:
        lines = self._path.read_bytes().splitlines(keepends=True)
        return b"".join(line for line in lines if _step_of(line) <= step)

    def _is_whole(self, row: bytes) -> bool:
        return parsed(row) is not None


def _step_of(line: bytes) -> float:
    step = (parsed(line) or {}).get("step")
    return step if isinstance(step, int) else -math.inf


def parsed(line: bytes) -> dict[str, Any] | None:
    """Returns the object in ``line``, or None if there is no whole one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
