"""Writes a run's figures to a table that spreadsheets read."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TextIO

from dtrain.errors import ConfigError
from dtrain.sinks.report import Report
from dtrain.sinks.sink import Sink

_FIXED = ("step", "epoch", "kind", "seconds", "samples")


class CSV(Sink):
    """Appends each ``train`` and ``eval`` report as a row to a file in the run's folder.

    The first columns are ``step``, ``epoch`` (from 0), ``kind``, ``seconds`` and ``samples``
    (both since ``fit`` began); then comes one for each value, in the order in which they were
    first seen. What a report does not have is an empty cell; numbers that are not finite are
    ``nan``, ``inf`` and ``-inf``. A row is on its way to the disk before the next report is taken.

    A new value makes a new column: the file is then written once more with the wider header,
    aside, and renamed into place. A run that is continued goes on in the same file; what an
    earlier start had written about steps that are now taken again is dropped, as is a last row
    that a kill cut short.

    Example::

        Trainer(model, optimizer, loss_fn, sinks=[Console(), CSV()], run_dir="runs/first")

    Args:
        filename: the file's name, within the run's folder.
        on_error: ``"raise"`` ends the run if it cannot be written; see :class:`~dtrain.Sink`.

    Ranks: rank 0 only.
    """

    def __init__(
        self, filename: str = "metrics.csv", *, on_error: Literal["warn", "raise"] = "warn"
    ) -> None:
        self.filename = filename
        self.on_error = on_error
        self._path = Path()
        self._columns: list[str] = []
        self._file: TextIO | None = None

    def open(self, run_dir: Path | None) -> None:
        """Opens the file for appending, and makes it where there is none.

        Raises:
            ConfigError: the run has no folder, or the file is something else's.
            OSError: the file cannot be written.
        """
        if run_dir is None:
            raise ConfigError(
                f"CSV writes {self.filename} into the run's folder, and this run has none: "
                'name one with Trainer(run_dir="runs/first"), or remove the sink'
            )
        self._path = run_dir / self.filename
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_row(self._path)
        self._columns = _read_header(self._path)
        if not self._columns:
            self._columns = list(_FIXED)
            self._rewrite(lambda step: True)
        self._file = self._append()

    def write(self, report: Report) -> None:
        """Adds a row for ``train`` and ``eval`` reports; ``start`` drops what comes again."""
        if self._file is None:
            raise RuntimeError("CSV.write() was called before open()")
        if report.kind == "start":
            self._replace(lambda step: step <= report.step)
        elif report.kind in ("train", "eval"):
            new = [name for name in report.values if name not in self._columns]
            if new:
                self._columns += new
                self._replace(lambda step: True)
            row: dict[str, object] = {
                **{name: float(value) for name, value in report.values.items()},
                "step": report.step,
                "epoch": report.epoch,
                "kind": report.kind,
                "seconds": round(report.seconds, 6),
                "samples": report.samples,
            }
            _writer(self._file).writerow([row.get(name, "") for name in self._columns])
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self) -> TextIO:
        return self._path.open("a", encoding="utf-8", newline="")

    def _replace(self, keep: Callable[[int], bool]) -> None:
        self.close()
        self._rewrite(keep)
        self._file = self._append()

    def _rewrite(self, keep: Callable[[int], bool]) -> None:
        """Writes the header and the old rows of steps to ``keep``; the file is always whole."""
        aside = self._path.with_name(self._path.name + ".tmp")
        with aside.open("w", encoding="utf-8", newline="") as new:
            writer = _writer(new)
            writer.writerow(self._columns)
            if self._path.exists():
                with self._path.open(encoding="utf-8", newline="") as old:
                    rows = csv.reader(old)
                    next(rows, None)
                    writer.writerows(_widened(rows, len(self._columns), keep))
            new.flush()
            os.fsync(new.fileno())
        aside.replace(self._path)


def _widened(
    rows: Iterable[list[str]], width: int, keep: Callable[[int], bool]
) -> Iterable[list[str]]:
    for row in rows:
        if row and (not row[0].isdigit() or keep(int(row[0]))):
            yield row + [""] * (width - len(row))


def _writer(file: TextIO) -> Any:
    return csv.writer(file, lineterminator="\n")


def _drop_torn_row(path: Path) -> None:
    """Removes what follows the last line feed: a number in it may have been cut short."""
    if path.exists():
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            os.truncate(path, end)


def _read_header(path: Path) -> list[str]:
    """Returns the columns of the file that is there; none where there is none, or no row.

    Raises:
        ConfigError: it was not written by this sink.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file), [])
    if columns and columns[: len(_FIXED)] != list(_FIXED):
        raise ConfigError(
            f"CSV: {path} is there, with other columns ({', '.join(columns[:5])}); move it away, "
            'or choose another name with CSV("figures.csv")'
        )
    return columns
