"""A file of rows in the run's folder, in which a continued run goes on."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from dtrain.sinks.sink import FIGURES, OnError, Report, Sink, place_in


class RowFile(Sink, ABC):
    """Appends a row for each report of some kinds; what CSV, Journal and JSONLines share."""

    kinds: Sequence[str] = FIGURES  # of reports that have a row

    def __init__(self, filename: str, on_error: OnError) -> None:
        self.filename = filename
        self.files = [filename]
        self.on_error = on_error
        self._file: TextIO | None = None

    def open(self, run_dir: Path | None) -> None:
        self._path = place_in(run_dir, self.filename, sink=type(self).__name__)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        data = self._path.read_bytes()
        last = data[data.rfind(b"\n") + 1 :]
        self._rewrite(data + b"\n" if self._is_whole(last) else data.removesuffix(last))

    def write(self, report: Report) -> None:
        if self._file is None:
            raise RuntimeError(f"{type(self).__name__}.write() was called before open()")
        if report.kind == "start":
            self._rewrite(self._upto(report.step))
        if report.kind in self.kinds:
            fixed = {
                "step": report.step,
                "epoch": report.epoch,
                "kind": report.kind,
                "seconds": round(report.seconds, 6),
                "samples": report.samples,
            }
            values = {name: float(value) for name, value in report.values.items()}
            row = self._row(fixed, values, report)
            self._file.write(row)
            self._file.flush()  # on its way to the disk before the next report is taken

    def flush(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @abstractmethod
    def _row(self, fixed: dict[str, Any], values: dict[str, float], report: Report) -> str:
        """Returns a row: what each has first, and not to be overwritten, and a report's values."""

    @abstractmethod
    def _upto(self, step: float) -> bytes:
        """Returns the file less rows after ``step``; others', which say no step, stay."""

    def _is_whole(self, row: bytes) -> bool:
        """Says whether a row that lacks its line feed lacks nothing else, such as a digit."""
        return False

    def _rewrite(self, data: bytes) -> None:
        """Makes ``data`` all that the file holds; at every instant the file is whole."""
        self.close()
        if data != self._path.read_bytes():
            aside = self._path.with_name(self._path.name + ".tmp")
            with aside.open("wb") as new:
                new.write(data)
                new.flush()
                os.fsync(new.fileno())
            aside.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8", newline="")
