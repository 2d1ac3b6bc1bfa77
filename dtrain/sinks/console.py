"""Shows a run to the person who started it."""

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console as Terminal
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dtrain.sinks.sink import OnError, Report, Sink

_NARROWEST, _WIDEST = 8, 40  # the bar, in columns
_MOST_RATES = 4  # of parameter groups, in a line; else only the first's
_REDRAW_S = 0.05  # drawing takes about 1 ms, and the training would wait for it (the GIL)


class Console(Sink):
    """Shows progress: a live bar on a terminal, plain lines in a file or a pipe.

    On a terminal, evaluations and messages appear above the bar, and so does what the training
    itself prints on this rank. Elsewhere each report is a line, without colours. Epochs count from
    1 here. Samples per second are those of all ranks, since the report before, without the time
    that evaluations take; the time left is estimated from the whole run so far.

    Args:
        stream: where to write; ``sys.stdout`` at the run's start if None.
        on_error: ``"raise"`` ends the run if it cannot be written; see :class:`~dtrain.Sink`.
    """

    def __init__(self, stream: TextIO | None = None, *, on_error: OnError = "warn") -> None:
        self.on_error = on_error
        self._stream = stream

    def open(self, run_dir: Path | None) -> None:
        self._out = self._stream or sys.stdout
        terminal = Terminal(
            file=self._out, markup=False, emoji=False, highlight=False, force_jupyter=False
        )
        # isatty as well, because FORCE_COLOR makes rich believe that a file is a terminal.
        self._terminal = terminal if self._out.isatty() and terminal.is_interactive else None
        self._live: Live | None = None
        self._drawn = -math.inf  # when the bar was, in the report's seconds
        self._first: Report | None = None
        self._mark = (0, 0.0)  # samples and seconds from which on speed is measured
        self._speed = ""
        self._told: Mapping[str, float] = {}  # by the newest train report

    def write(self, report: Report) -> None:
        if report.kind == "train":
            self._told = report.values
            place, pace = _place(report), self._pace(report)
            if self._terminal is None:
                self._print("  ".join([*place, *_figures(report.values, "train/"), *pace]))
            else:
                loss = {k: v for k, v in report.values.items() if k == "train/loss"}
                self._show_bar(report, [*place, *_figures(loss, "train/"), *pace])
        elif report.kind == "epoch":
            # Where one report was of the whole epoch, that line says it already.
            told = {name.replace("train/", "epoch/", 1): v for name, v in self._told.items()}
            if self._terminal is not None or not report.values.items() <= told.items():
                self._print("  ".join([*_place(report), *_figures(report.values)]))
        elif report.kind == "eval":
            self._print("  ".join([*_place(report), *_figures(report.values)]), style="bold")
            self._mark = (report.samples, report.seconds)
        elif report.sample is not None:
            if report.text:
                self._print(f"--- {report.sample.name}:\n{report.text}\n---")
        else:
            if report.kind == "end":
                self.close()  # it stays where it is, and the last words come below it
            if report.text:
                self._print(report.text)
            if report.kind == "start":
                self._first = report
                self._mark = (report.samples, report.seconds)
                self._show_bar(report, _place(report))

    def say(self, text: str) -> None:
        """Prints a line, at any time."""
        print(text, file=self._stream or sys.stdout, flush=True)

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _pace(self, report: Report) -> list[str]:
        """Returns samples per second and the time left, as far as they are known."""
        samples, seconds = report.samples - self._mark[0], report.seconds - self._mark[1]
        if samples > 0 and seconds > 0:
            speed = samples / seconds
            self._speed = f"{speed:{'.0f' if speed >= 100 else '.3g'}} samples/s"
            self._mark = (report.samples, report.seconds)
        self._first = self._first or report
        steps, seconds = report.step - self._first.step, report.seconds - self._first.seconds
        left = (report.total_steps or 0) - report.step
        time_left = f"{_duration(left * seconds / steps)} left" if left > 0 and steps > 0 else ""
        return [part for part in (self._speed, time_left) if part]

    def _print(self, text: str, style: str | None = None) -> None:
        if self._terminal is None:
            print(text, file=self._out, flush=True)
        else:
            self._terminal.print(text, style=style, soft_wrap=True)

    def _show_bar(self, report: Report, parts: list[str]) -> None:
        if self._terminal is None:
            return
        text = Text("  ".join(parts), no_wrap=True, overflow="ellipsis")
        row, bar = Table.grid(padding=(0, 2)), []
        room = self._terminal.width - text.cell_len - 4  # 2 between bar and text, 2 for the cursor
        if report.total_steps and room >= _NARROWEST:
            row.add_column(width=min(room, _WIDEST), no_wrap=True)
            bar = [ProgressBar(total=report.total_steps, completed=report.step)]
        row.add_column(no_wrap=True)
        row.add_row(*bar, text)
        if self._live is None:
            self._live = Live(
                console=self._terminal,
                auto_refresh=False,  # a report is what changes it; no second thread
                redirect_stdout=sys.stdout.isatty(),  # not if it is a file: prints belong there
                redirect_stderr=sys.stderr.isatty(),
            )
            self._drawn = -math.inf
            self._live.start()
            self._terminal.show_cursor(True)  # a killed run must not leave it hidden
        # Where it is not drawn now, it is with the next line above it, or at the end.
        redraw = report.seconds - self._drawn >= _REDRAW_S
        self._drawn = report.seconds if redraw else self._drawn
        self._live.update(row, refresh=redraw)


def _place(report: Report) -> list[str]:
    step, epoch = f"step {report.step}", f"epoch {report.epoch + 1}"
    if report.total_steps:
        step += f"/{report.total_steps}"
        epochs = report.total_epochs  # of all fits so far
        if epochs is None and report.steps_per_epoch:
            epochs = math.ceil(report.total_steps / report.steps_per_epoch)
        epoch += f"/{epochs}" if epochs else ""
    return [step, epoch]


def _figures(values: Mapping[str, float], without: str = "") -> list[str]:
    rates = [name for name in values if name.startswith("lr/")]
    left_out = rates if len(rates) > _MOST_RATES else ()
    shown = {name: v for name, v in values.items() if name not in left_out}
    return [f"{name.removeprefix(without)} {_number(name, v)}" for name, v in shown.items()]


def _number(name: str, value: float) -> str:
    if name.rpartition("/")[2] == "lr" or name.startswith("lr/"):
        return f"{value:.1e}"
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {s:02} s" if minutes else f"{s} s"


def _forget_bar() -> None:
    """Lets a forked process, such as a data loader's worker, print straight to the terminal.

    Its parent's bar would be drawn twice, and the lock around it may be held for ever.
    """
    if isinstance(sys.stdout, FileProxy):
        sys.stdout = sys.stdout.rich_proxied_file
    if isinstance(sys.stderr, FileProxy):
        sys.stderr = sys.stderr.rich_proxied_file


os.register_at_fork(after_in_child=_forget_bar)
