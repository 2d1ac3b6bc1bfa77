"""Writes a run's figures to a file, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal, TextIO

from dtrain.errors import ConfigError
from dtrain.sinks.report import Report
from dtrain.sinks.sink import Sink


class JSONLines(Sink):
    """Appends each ``train`` and ``eval`` report to a file in the run's folder.

    A line has the keys ``step``, ``epoch`` (from 0), ``kind``, ``seconds`` and ``samples``
    (both since ``fit`` began), then the report's values under their own names, and is on its
    way to the disk before the next report is taken. JSON has no word for numbers that are not
    finite: they are the strings ``"nan"``, ``"inf"`` and ``"-inf"``, so ``float(row[name])``
    reads any value back.

    A run that is continued goes on in the same file. What an earlier start had written about
    steps that are now taken again is dropped, as is a last line that a kill cut short.

    Args:
        filename: the file's name, within the run's folder.
        on_error: ``"raise"`` ends the run if it cannot be written; see :class:`~dtrain.Sink`.

    Ranks: rank 0 only.
    """

    def __init__(
        self, filename: str = "metrics.jsonl", *, on_error: Literal["warn", "raise"] = "warn"
    ) -> None:
        self.filename = filename
        self.on_error = on_error
        self._path = Path()
        self._file: TextIO | None = None

    def open(self, run_dir: Path | None) -> None:
        """Opens the file for appending, and makes it where there is none.

        Raises:
            ConfigError: the run has no folder.
            OSError: the file cannot be written.
        """
        if run_dir is None:
            raise ConfigError(
                f"JSONLines writes {self.filename} into the run's folder, and this run has none: "
                'name one with Trainer(run_dir="runs/first"), or remove the sink'
            )
        self._path = run_dir / self.filename
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _mend_last_line(self._path)
        self._file = self._append()

    def write(self, report: Report) -> None:
        """Adds a line for ``train`` and ``eval`` reports; ``start`` drops what comes again."""
        if self._file is None:
            raise RuntimeError("JSONLines.write() was called before open()")
        if report.kind == "start":
            self._file.close()
            _drop_after(self._path, report.step)
            self._file = self._append()
        elif report.kind in ("train", "eval"):
            fixed = {
                "step": report.step,
                "epoch": report.epoch,
                "kind": report.kind,
                "seconds": round(report.seconds, 6),
                "samples": report.samples,
            }
            values = {name: _json_value(value) for name, value in report.values.items()}
            row = fixed | values | fixed  # first in order, and not to be overwritten
            self._file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self) -> TextIO:
        return self._path.open("a", encoding="utf-8", newline="\n")


def _json_value(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _mend_last_line(path: Path) -> None:
    """Removes a last line that was cut short; ends one that lacks only its line feed."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        tail = b""
        start = file.seek(0, os.SEEK_END)
        while start > 0 and b"\n" not in tail:
            size = min(start, 65536)
            start = file.seek(start - size)
            tail = file.read(size) + tail
        last = tail[tail.rfind(b"\n") + 1 :]
        if not last:
            return
        if _parse(last) is None:
            file.seek(-len(last), os.SEEK_END)
            file.truncate()
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


def _drop_after(path: Path, step: int) -> None:
    """Removes lines about steps after ``step``; at every instant the file is whole.

    Lines that say no step are somebody else's, and stay.
    """
    dropped = False
    temporary = path.with_name(path.name + ".tmp")
    with path.open("rb") as old, temporary.open("wb") as new:
        for line in old:
            found = (_parse(line) or {}).get("step")
            if isinstance(found, int) and found > step:
                dropped = True
            else:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    if dropped:
        temporary.replace(path)
    else:
        temporary.unlink()


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns the object in ``line``, or None if there is no whole one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
