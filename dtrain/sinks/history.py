"""What a run reports: to the sinks, and to whoever called ``fit``."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dtrain.context import Outbox, Progress
from dtrain.sinks.dispatcher import Dispatcher
from dtrain.sinks.sink import Report, ReportKind


@dataclass
class History:
    """Turns figures into reports: puts step, epoch and time to them, and keeps a history.

    Ranks: all, local; rank 0's reach the sinks.
    """

    progress: Progress
    outbox: Outbox
    dispatcher: Dispatcher
    tell: Callable[[Report], None] | None = None  # is told each report as well

    def __post_init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._began = time.perf_counter()
        self._samples_before = self.progress.samples

    def check(self) -> None:
        """Raises SinkError on rank 0 if a sink failed that must not. Ranks: all, local."""
        self.dispatcher.check()

    def report(
        self,
        kind: ReportKind,
        values: Mapping[str, float],
        text: str = "",
        *,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Sends figures or a text to the sinks, after what callbacks had to say."""
        for note in self.outbox.notes:
            self._send("message", text=note)
        self.outbox.notes.clear()
        for shown in self.outbox.shown:
            self._send("sample", text=shown.text, sample=shown)
        self.outbox.shown.clear()
        if kind in ("train", "eval"):
            self.rows.append({"step": self.progress.step, "epoch": self.progress.epoch, **values})
        # A copy of the values, because callbacks may keep and change theirs.
        self._send(kind, values=dict(values), text=text, config=config or {})

    def _send(self, kind: ReportKind, **what: Any) -> None:
        progress = self.progress
        report = Report(
            kind,
            progress.step,
            progress.epoch,
            seconds=time.perf_counter() - self._began,
            samples=progress.samples - self._samples_before,
            total_steps=progress.total_steps,
            steps_per_epoch=progress.steps_per_epoch,
            **what,
        )
        if self.tell is not None:
            self.tell(report)
        self.dispatcher.send(report)
