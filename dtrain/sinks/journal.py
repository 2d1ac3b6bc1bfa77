"""Keeps all that a run reports, for `dtrain report`."""

import base64
import io
import json
import math
import time
from typing import Any, get_args

from dtrain.context import Shown
from dtrain.sinks.json_lines import parsed
from dtrain.sinks.row_file import RowFile
from dtrain.sinks.sink import FIGURES, OnError, Report, ReportKind


class Journal(RowFile):
    """Appends every report to a file in the run's folder: `dtrain report` makes a page of it.

    A line is a JSON object with ``kind``, ``step``, ``epoch`` (from 0), ``seconds`` and ``samples``
    (since ``fit`` began), and ``time`` (seconds since 1970). Figures are under ``values``; a start
    has the user's settings (``config``), and ``facts``: ranks, versions, callbacks by hook;
    messages and the end have a ``text``; what ``ctx.show`` was given is a ``sample``, pictures as
    PNG in base64 (where the package pillow is installed, else a line says that it is not).

    A run that is continued goes on in the same file. Figures and samples of steps that are now
    taken again are dropped; what was told stays.

    Args:
        filename: the file's name, within the run's folder.
        on_error: ``"raise"`` ends the run if it cannot be written; see :class:`~dtrain.Sink`.
    """

    kinds = get_args(ReportKind)

    def __init__(self, filename: str = "journal.jsonl", *, on_error: OnError = "warn") -> None:
        super().__init__(filename, on_error)

    def _row(self, fixed: dict[str, Any], values: dict[str, float], report: Report) -> str:
        line = fixed | {"time": round(time.time(), 3)}
        if report.kind in FIGURES:
            line["values"] = {name: _number(value) for name, value in values.items()}
        if report.text and report.sample is None:
            line["text"] = report.text
        if report.kind == "start":
            line |= {"config": dict(report.config), "facts": dict(report.facts)}
            line |= {"total_steps": report.total_steps, "steps_per_epoch": report.steps_per_epoch}
        if report.sample is not None:
            line["sample"] = _shown(report.sample)
        return json.dumps(line, allow_nan=False, ensure_ascii=False, default=str) + "\n"

    def _upto(self, step: float) -> bytes:
        kept = []
        for line in self._path.read_bytes().splitlines(keepends=True):
            found = parsed(line)
            if found is None:
                continue
            again = found.get("kind") in (*FIGURES, "sample") and found.get("step", 0) > step
            kept += [] if again else [line]
        return b"".join(kept)

    def _is_whole(self, row: bytes) -> bool:
        return parsed(row) is not None


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _shown(sample: Shown) -> dict[str, Any]:
    shown = {"name": sample.name}
    if sample.text:
        shown["text"] = sample.text
    if sample.image is not None:
        try:
            from PIL import Image
        except ImportError:
            shown["missing"] = "a picture, left out: pip install dtrain[report]"
            return shown
        png = io.BytesIO()
        Image.fromarray(sample.image).save(png, "PNG", optimize=True)
        shown["png"] = base64.b64encode(png.getvalue()).decode()
    return shown
