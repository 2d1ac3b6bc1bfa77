"""What a person sees: exact lines in a file, and a bar on a terminal."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.file_proxy import FileProxy

from dtrain.sinks import Console
from dtrain.sinks.console import _forget_bar
from dtrain.sinks.dispatcher import Dispatcher
from dtrain.sinks.sink import Report

PLAN: dict[str, Any] = {"total_steps": 230, "steps_per_epoch": 23}


def show(*reports: Report, stream: io.StringIO | None = None) -> list[str]:
    """Returns the lines that the reports make, without what moves the cursor or colours."""
    stream = stream or io.StringIO()
    sink = Console(stream)
    sink.open(None)
    for report in reports:
        sink.write(report)
    sink.close()
    return stream.getvalue().splitlines()


def train(step: int, seconds: float = 0.0, samples: int = 0, **more: Any) -> Report:
    values = more.pop("values", {"train/loss": 0.8123})
    return Report("train", step, 1, values, seconds=seconds, samples=samples, **more)


# ----------------------------------------------------------------------------- no terminal


def test_a_line_for_each_report() -> None:
    values = {"train/loss": 0.81234, "train/accuracy": 0.912, "lr": 1e-3}
    evaluated = {"eval/loss": 0.7, "eval/accuracy": 0.93}
    lines = show(
        Report("start", 0, 0, text="64 = 2 ranks x 32 samples\n  seed 0", **PLAN),
        train(50, 10.0, 4120, values=values, **PLAN),
        Report("eval", 50, 1, evaluated, seconds=20.0, samples=4120, **PLAN),
        Report("message", 50, 1, text="saved step-50 [1/3] :tada:"),
        train(60, 30.0, 8240, **PLAN),
        Report("end", 60, 2, text="stopped at step 60:\n  asked to"),
    )
    assert lines == [
        "64 = 2 ranks x 32 samples",
        "  seed 0",
        "step 50/230  epoch 2/10  loss 0.8123  accuracy 0.912  lr 1.0e-03  412 samples/s"
        "  36 s left",
        "step 50/230  epoch 2/10  eval/loss 0.7  eval/accuracy 0.93",
        "saved step-50 [1/3] :tada:",
        "step 60/230  epoch 2/10  loss 0.8123  412 samples/s  1 min 25 s left",
        "stopped at step 60:",
        "  asked to",
    ]


def test_what_is_not_known_is_not_shown() -> None:
    assert show(train(50)) == ["step 50  epoch 2  loss 0.8123"]
    assert show(train(50, total_steps=230)) == ["step 50/230  epoch 2  loss 0.8123"]
    assert show(train(50, steps_per_epoch=23)) == ["step 50  epoch 2  loss 0.8123"]


def test_an_epochs_means_make_a_line_unless_the_last_one_said_so() -> None:
    def means(value: float) -> Report:
        return Report("epoch", 50, 1, {"epoch/loss": value})

    assert show(train(50), means(0.8123)) == ["step 50  epoch 2  loss 0.8123"]
    assert show(train(50), means(0.5))[1:] == ["step 50  epoch 2  epoch/loss 0.5"]
    assert show(means(0.5)) == ["step 50  epoch 2  epoch/loss 0.5"]


def test_rates_of_many_groups_are_left_out() -> None:
    few, many = ({"lr": 0.1} | {f"lr/{i}": 0.2 for i in range(1, n)} for n in (5, 6))
    assert show(train(1, values=few)) == [
        "step 1  epoch 2  lr 1.0e-01  lr/1 2.0e-01  lr/2 2.0e-01  lr/3 2.0e-01  lr/4 2.0e-01"
    ]
    assert show(train(1, values=many)) == ["step 1  epoch 2  lr 1.0e-01"]


def test_reports_without_words_make_no_line() -> None:
    assert show(Report("start", 0, 0), Report("message", 1, 0), Report("end", 1, 0)) == []


def test_a_last_epoch_that_is_not_whole_counts() -> None:
    plan = {"total_steps": 24, "steps_per_epoch": 23}
    assert show(train(24, **plan)) == ["step 24/24  epoch 2/2  loss 0.8123"]


def test_samples_per_second_are_those_since_the_report_before() -> None:
    lines = show(train(10, 2.0, 1000), train(20, 4.0, 2000), train(30, 8.0, 2200))
    assert [line.split("  ")[-1] for line in lines] == [
        "500 samples/s",
        "500 samples/s",
        "50 samples/s",
    ]


def test_the_time_of_an_evaluation_is_not_that_of_training() -> None:
    lines = show(
        train(10, 2.0, 1000),
        Report("eval", 10, 1, {}, seconds=100.0, samples=1000),
        train(10, 100.5, 1000),  # nothing was trained on since: the speed is the last known
        train(20, 102.0, 2000),
    )
    assert [line.split("  ")[-1] for line in lines] == [
        "500 samples/s",
        "epoch 2",
        "500 samples/s",
        "500 samples/s",
    ]


def test_a_resumed_run_counts_time_from_its_own_start() -> None:
    lines = show(Report("start", 130, 5, **PLAN), train(150, 10.0, **PLAN))
    assert lines == ["step 150/230  epoch 2/10  loss 0.8123  40 s left"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s left"),
        (59.0, "59 s left"),
        (60.0, "1 min 00 s left"),
        (3599.0, "59 min 59 s left"),
        (3600.0, "1 h 00 min left"),
        (86399.0, "23 h 59 min left"),
        (100_000.0, "1 d 3 h left"),
    ],
)
def test_time_left(seconds: float, words: str) -> None:
    lines = show(Report("start", 0, 0), train(5, seconds, total_steps=10))
    assert lines == [f"step 5/10  epoch 2  loss 0.8123  {words}"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0"),
        (2.0, "2"),
        (0.81236, "0.8124"),
        (-12.3456, "-12.35"),
        (9999.4, "9999"),
        (12345.6, "12346"),
        (1.23456e12, "1.235e+12"),
        (0.000012345, "1.234e-05"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_numbers(value: float, words: str) -> None:
    assert show(train(1, values={"train/x": value})) == [f"step 1  epoch 2  x {words}"]


@pytest.mark.parametrize("name", ["lr", "train/lr", "lr/backbone"])
def test_learning_rates(name: str) -> None:
    shown = name.removeprefix("train/")
    assert show(train(1, values={name: 3e-4})) == [f"step 1  epoch 2  {shown} 3.0e-04"]


@pytest.mark.parametrize(
    ("rate", "words"),
    [(0.51234, "0.512"), (99.06, "99.1"), (412.4, "412"), (123456.7, "123457")],
)
def test_rates(rate: float, words: str) -> None:
    lines = show(train(1, 1000.0, round(rate * 1000)))
    assert lines == [f"step 1  epoch 2  loss 0.8123  {words} samples/s"]


def test_a_file_gets_no_ansi_codes_even_if_colour_is_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    show(
        Report("start", 0, 0, text="hello", **PLAN),
        train(1, **PLAN),
        Report("eval", 1, 0, {"eval/loss": 1.0}),
        stream=stream,
    )
    assert "\x1b" not in stream.getvalue()


def test_it_writes_to_stdout_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    dispatcher = Dispatcher([Console()], None)
    dispatcher.open()
    dispatcher.send(train(1))
    dispatcher.close()
    assert capsys.readouterr().out == "step 1  epoch 2  loss 0.8123\n"


def test_lines_are_written_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    with path.open("w", encoding="utf-8") as stream:
        sink = Console(stream)
        sink.open(None)
        sink.write(train(1))
        assert path.read_text(encoding="utf-8") == "step 1  epoch 2  loss 0.8123\n"


def test_a_second_run_starts_from_nothing() -> None:
    stream = io.StringIO()
    sink = Console(stream)
    for _ in range(2):
        sink.open(None)
        sink.write(train(10, 2.0, 1000, total_steps=20))
        sink.write(train(15, 3.0, 1500, total_steps=20))
        sink.close()
    once = [
        "step 10/20  epoch 2  loss 0.8123  500 samples/s",
        "step 15/20  epoch 2  loss 0.8123  500 samples/s  1 s left",
    ]
    assert stream.getvalue().splitlines() == once * 2


# -------------------------------------------------------------------------------- a terminal


class Tty(io.StringIO):
    """Looks like a terminal, and shows what it would."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """Returns the lines seen: carriage return, line feed and erase-line are followed."""
        rows, row = [""], 0
        for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", self.getvalue(), re.DOTALL):
            if token == "\n":
                row += 1
                rows += [""] * (row == len(rows))
            elif token == "\x1b[2K":
                rows[row] = ""
            elif token[0] not in "\x1b\r":
                rows[row] += token
            else:
                # Anything that moves up would need a better screen than this.
                assert token == "\r" or token[-1] in "mhl", token
        return [text.rstrip() for text in rows]


@pytest.fixture
def tty(monkeypatch: pytest.MonkeyPatch) -> Tty:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    return Tty()


def test_a_bar_that_is_redrawn_below_the_lines(tty: Tty) -> None:
    sink = Console(tty)
    sink.open(None)
    sink.write(Report("start", 0, 0, text="hello\nworld", **PLAN))
    assert tty.screen() == ["hello", "world", "━" * 40 + "  step 0/230  epoch 1/10"]
    sink.write(train(115, 10.0, 4120, **PLAN))
    bar = "━━━━━━╸━━━━━━  step 115/230  epoch 2/10  loss 0.8123  412 samples/s  10 s left"
    assert tty.screen() == ["hello", "world", bar]
    sink.write(Report("eval", 115, 1, {"eval/loss": 0.7}, "", 11.0, 4120, **PLAN))
    sink.write(Report("message", 115, 1, text="saved [bold]1/3[/bold] :tada:"))
    lines = ["step 115/230  epoch 2/10  eval/loss 0.7", "saved [bold]1/3[/bold] :tada:"]
    assert tty.screen() == ["hello", "world", *lines, bar]
    sink.write(train(230, 20.0, 8240, **PLAN))
    sink.write(Report("end", 230, 10, text="done"))
    sink.close()
    bar = "━" * 24 + "  step 230/230  epoch 2/10  loss 0.8123  458 samples/s"
    assert tty.screen() == ["hello", "world", *lines, bar, "done", ""]


def test_no_bar_without_a_total_or_without_room(tty: Tty, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Console(tty)
    sink.open(None)
    sink.write(train(5))
    assert tty.screen() == ["step 5  epoch 2  loss 0.8123"]
    sink.close()
    monkeypatch.setenv("COLUMNS", "24")
    sink.open(None)
    sink.write(train(5, total_steps=10))
    assert tty.screen() == ["step 5  epoch 2  loss 0.8123", "step 5/10  epoch 2  los…"]
    sink.close()


def test_reports_that_follow_at_once_are_drawn_with_the_last_words(tty: Tty) -> None:
    sink = Console(tty)
    sink.open(None)
    sink.write(train(1, 0.010))
    sink.write(train(2, 0.011))
    assert tty.screen() == ["step 1  epoch 2  loss 0.8123"]
    sink.close()
    assert tty.screen() == ["step 2  epoch 2  loss 0.8123", ""]


def test_a_long_line_is_not_broken(tty: Tty) -> None:
    text = "word " * 30 + "end"
    assert show(Report("message", 0, 0, text=text), stream=tty) == [text]


def test_the_cursor_stays_visible_while_the_bar_is_shown(tty: Tty) -> None:
    sink = Console(tty)
    sink.open(None)
    sink.write(train(5))
    assert tty.getvalue().rindex("\x1b[?25h") > tty.getvalue().rindex("\x1b[?25l")
    sink.close()


def test_prints_appear_above_the_bar(tty: Tty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", tty)
    monkeypatch.setattr(sys, "stderr", tty)
    sink = Console()
    sink.open(None)
    sink.write(train(5))
    print("from the training")
    print("and a warning", file=sys.stderr)
    assert tty.screen() == ["from the training", "and a warning", "step 5  epoch 2  loss 0.8123"]
    sink.close()
    assert sys.stdout is tty
    assert sys.stderr is tty


def test_what_goes_to_a_file_goes_on_to_the_file(tty: Tty, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    sink = Console(tty)
    sink.open(None)
    sink.write(train(5))
    print("an error", file=sys.stderr)
    sink.close()
    assert file.getvalue() == "an error\n"
    assert tty.screen() == ["step 5  epoch 2  loss 0.8123", ""]


def test_a_forked_process_prints_past_the_bar(tty: Tty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", tty)
    monkeypatch.setattr(sys, "stderr", tty)
    sink = Console()
    sink.open(None)
    sink.write(train(5))
    assert [type(sys.stdout), type(sys.stderr)] == [FileProxy, FileProxy]
    _forget_bar()
    assert sys.stdout is tty
    assert sys.stderr is tty
    sink.close()


def test_a_dumb_terminal_gets_plain_lines(tty: Tty, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    show(Report("start", 0, 0, text="hello", **PLAN), train(5), stream=tty)
    assert tty.getvalue() == "hello\nstep 5  epoch 2  loss 0.8123\n"
