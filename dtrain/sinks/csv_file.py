"""Writes a run's figures to a table that spreadsheets read."""

import csv
import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dtrain.errors import ConfigError
from dtrain.sinks.row_file import RowFile
from dtrain.sinks.sink import OnError, Report

_FIXED = ["step", "epoch", "kind", "seconds", "samples"]


class CSV(RowFile):
    """Appends each ``train``, ``epoch`` and ``eval`` report as a row to a file in the run's folder.

    The first columns are ``step``, ``epoch`` (from 0), ``kind``, ``seconds`` and ``samples``
    (both since ``fit`` began); then comes one for each value, in the order in which they were
    first seen. What a report does not have is an empty cell; numbers that are not finite are
    ``nan``, ``inf`` and ``-inf``. A row is on its way to the disk before the next report is taken.

    A new value makes a new column: the file is written anew with it, aside, and renamed into place.
    A run that is continued goes on in the same file; what an earlier start wrote about steps that
    are now taken again is dropped, as is a row that a kill cut short.

    Args:
        filename: the file's name, within the run's folder.
        on_error: ``"raise"`` ends the run if it cannot be written; see :class:`~dtrain.Sink`.
    """

    def __init__(self, filename: str = "metrics.csv", *, on_error: OnError = "warn") -> None:
        super().__init__(filename, on_error)

    def open(self, run_dir: Path | None) -> None:
        super().open(run_dir)
        rows = self._rows()
        self._columns: list[str] = rows[0] if rows else [*_FIXED]
        if not rows:
            self._rewrite(self._upto(math.inf))
        elif self._columns[: len(_FIXED)] != _FIXED:
            self.close()
            raise ConfigError(
                f"CSV: {self._path} is there, with other columns ({', '.join(self._columns[:5])}); "
                'move it away, or choose another name with CSV("figures.csv")'
            )

    def _row(self, fixed: dict[str, Any], values: dict[str, float], report: Report) -> str:
        if new := [name for name in values if name not in self._columns]:
            self._columns += new
            self._rewrite(self._upto(math.inf))
        row = values | fixed
        return _line(row.get(name, "") for name in self._columns)

    def _upto(self, step: float) -> bytes:
        """Returns the header as it is now, and the rows, as wide as that."""
        kept = [row for row in self._rows()[1:] if not row[0].isdigit() or int(row[0]) <= step]
        wide = [row + [""] * (len(self._columns) - len(row)) for row in kept]
        return "".join(_line(row) for row in [self._columns, *wide]).encode()

    def _rows(self) -> list[list[str]]:
        with self._path.open(encoding="utf-8", newline="") as file:
            return [row for row in csv.reader(file) if row]


def _line(cells: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
