"""What a run reports: to the sinks, and to whoever called ``fit``."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from dtrain.context import Outbox, Progress
from dtrain.sinks.dispatcher import Dispatcher
from dtrain.sinks.report import Report, ReportKind


class History:
    """Turns figures into reports: puts step, epoch and time to them, and keeps a history.

    Ranks: all, local; rank 0's reach the sinks.
    """

    def __init__(
        self,
        progress: Progress,
        outbox: Outbox,
        dispatcher: Dispatcher,
        tell: Callable[[Report], None] | None = None,
    ) -> None:
        self._tell = tell
        self.rows: list[dict[str, float]] = []
        self._progress = progress
        self._outbox = outbox
        self._dispatcher = dispatcher
        self._began = time.perf_counter()
        self._samples_before = progress.samples

    def check(self) -> None:
        """Raises SinkError on rank 0 if a sink failed that must not.

        Ranks: all, local; inside a phase in which an error reaches all ranks.
        """
        self._dispatcher.check()

    def report(
        self,
        kind: ReportKind,
        values: Mapping[str, float],
        text: str = "",
        *,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Sends figures or a text to the sinks, after what callbacks had to say."""
        for note in self._outbox.notes:
            self._send("message", text=note)
        self._outbox.notes.clear()
        for shown in self._outbox.shown:
            self._send("sample", text=shown.text, sample=shown)
        self._outbox.shown.clear()
        if kind in ("train", "eval"):
            progress = self._progress
            self.rows.append({"step": progress.step, "epoch": progress.epoch, **values})
        # A copy of the values, because callbacks may keep and change theirs.
        self._send(kind, values=dict(values), text=text, config=config or {})

    def _send(self, kind: ReportKind, **what: Any) -> None:
        progress = self._progress
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
        if self._tell is not None:
            self._tell(report)
        self._dispatcher.send(report)
