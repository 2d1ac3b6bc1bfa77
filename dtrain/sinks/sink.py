"""The base class of sinks."""

from pathlib import Path
from typing import Literal

from dtrain.sinks.report import Report

OnError = Literal["warn", "raise"]


class Sink:
    """Takes a run's figures somewhere. Runs on rank 0 only, in a thread of its own.

    Override :meth:`write`; it is handed frozen numbers and can reach no other rank.

    Attributes:
        on_error: ``"warn"``: a failure is reported once, the sink left out, and the training
            goes on; ``"raise"``: the run ends on all ranks at the next sync point.

    Ranks: rank 0 only.
    """

    on_error: OnError = "warn"

    def open(self, run_dir: Path | None) -> None:
        """The run begins; ``run_dir`` is its folder, or None where it keeps no files."""

    def write(self, report: Report) -> None:
        """One report: see :class:`dtrain.Report` for its kinds."""

    def close(self) -> None:
        """The run is over, well or badly; what is buffered must be written now."""
