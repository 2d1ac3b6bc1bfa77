"""The dispatcher: order, flushing, and sinks that raise, hang or are slow."""

import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.errors import ConfigError
from dtrain.sinks import dispatcher as module
from dtrain.sinks.dispatcher import Dispatcher
from dtrain.sinks.sink import Report, ReportKind, Sink

WAIT_S = 30.0  # how long a test waits for another thread before it fails


def report(step: int, kind: ReportKind = "train") -> Report:
    return Report(kind, step, 0)


class Recorder(Sink):
    """Keeps what it is handed."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.threads: set[int] = set()

    @property
    def steps(self) -> list[int]:
        return [call.step for call in self.calls if isinstance(call, Report)]

    def open(self, run_dir: Path | None) -> None:
        self.calls.append(("open", run_dir))
        self.threads.add(threading.get_ident())

    def write(self, report: Report) -> None:
        self.calls.append(report)
        self.threads.add(threading.get_ident())

    def close(self) -> None:
        self.calls.append("close")
        self.threads.add(threading.get_ident())


class Gated(Recorder):
    """Hangs in its first write until released."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.released = threading.Event()

    def write(self, report: Report) -> None:
        self.entered.set()
        assert self.released.wait(WAIT_S)
        super().write(report)


class RaisesAt(Recorder):
    """Raises at one step."""

    def __init__(self, step: int, *, close_too: bool = False) -> None:
        super().__init__()
        self.step = step
        self.close_too = close_too

    def write(self, report: Report) -> None:
        super().write(report)
        if report.step == self.step:
            raise OSError("the disk is full")

    def close(self) -> None:
        super().close()
        if self.close_too:
            raise ValueError("nor can it be closed")


class RaisesInClose(Recorder):
    def close(self) -> None:
        super().close()
        raise ValueError("cannot be closed")


class RaisesInOpen(Sink):
    def open(self, run_dir: Path | None) -> None:
        raise ConfigError("a run_dir is needed")


def line_of(function: Callable[..., object], statement: str) -> str:
    """Returns ``file:line`` of a statement in ``function``."""
    code = function.__code__
    lines = Path(code.co_filename).read_text(encoding="utf-8").splitlines()
    for number in range(code.co_firstlineno, len(lines) + 1):
        if statement in lines[number - 1]:
            return f"{code.co_filename}:{number}"
    raise AssertionError(statement)


def sink_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("dtrain-sink-")]


# ------------------------------------------------------------------------- the usual course


def test_every_sink_gets_all_reports_in_order_before_close_returns(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    dispatcher = Dispatcher([first, second], tmp_path)
    dispatcher.open()
    kinds: list[ReportKind] = ["start", "train", "eval", "message", "train", "end"]
    sent = [report(step, kind) for step, kind in enumerate(kinds * 100)]
    for one in sent:
        dispatcher.send(one)
    dispatcher.close()
    for sink in (first, second):
        assert sink.calls == [("open", tmp_path), *sent, "close"]
    assert dispatcher.failures == []
    assert dispatcher.dropped == {}
    assert sink_threads() == []


def test_each_sink_opens_writes_and_closes_in_one_thread_of_its_own() -> None:
    first, second = Recorder(), Recorder()
    dispatcher = Dispatcher([first, second], None)
    dispatcher.open()
    dispatcher.send(report(1))
    dispatcher.close()
    (one,), (two,) = first.threads, second.threads
    assert len({one, two, threading.get_ident()}) == 3


def test_open_is_synchronous() -> None:
    sink = Recorder()
    dispatcher = Dispatcher([sink], None)
    assert sink.calls == []
    dispatcher.open()
    assert sink.calls == [("open", None)]
    dispatcher.close()


def test_an_inactive_reporter_calls_no_sink(tmp_path: Path) -> None:
    sink = Recorder()
    dispatcher = Dispatcher([sink], tmp_path, active=False)
    dispatcher.open()
    dispatcher.send(report(1))
    assert sink_threads() == []
    dispatcher.close()
    assert sink.calls == []
    assert dispatcher.failures == []


def test_reports_sent_before_open_or_after_close_go_nowhere() -> None:
    sink = Recorder()
    dispatcher = Dispatcher([sink], None)
    dispatcher.send(report(1))
    dispatcher.open()
    dispatcher.send(report(2))
    dispatcher.close()
    dispatcher.send(report(3))
    dispatcher.close()
    assert sink.steps == [2]
    assert sink.calls.count("close") == 1


def test_a_sink_that_is_slow_to_open_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    told = threading.Event()

    class Slow(Sink):
        def open(self, run_dir: Path | None) -> None:
            told.wait(WAIT_S)

    def notify(self: Dispatcher, text: str) -> None:
        said.append(text)
        told.set()

    monkeypatch.setattr(module, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(Dispatcher, "_notify", notify)
    dispatcher = Dispatcher([Slow()], None)
    dispatcher.open()
    dispatcher.close()
    (text,) = said
    told_by = line_of(Slow.open, "told.wait(WAIT_S)")
    assert text == (
        "dtrain: the sink Slow is not open after 0.01 s, and the run waits for it; it is at "
        f"{told_by}"
    )


def test_it_can_be_opened_again() -> None:
    sink = Recorder()
    dispatcher = Dispatcher([sink], None)
    for step in (1, 2):
        dispatcher.open()
        dispatcher.send(report(step))
        dispatcher.close()
    assert sink.calls == [
        ("open", None),
        report(1),
        "close",
        ("open", None),
        report(2),
        "close",
    ]


# --------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize("active", [True, False])
def test_what_is_no_sink_is_refused_on_every_rank(active: bool) -> None:
    with pytest.raises(ConfigError) as caught:
        Dispatcher([Recorder], None, active=active)  # type: ignore[list-item]
    assert str(caught.value) == f"sinks: {Recorder!r} is no dtrain.Sink; did you mean `Recorder()`?"
    with pytest.raises(ConfigError) as caught:
        Dispatcher([print], None, active=active)  # type: ignore[list-item]
    assert str(caught.value) == "sinks: <built-in function print> is no dtrain.Sink"


def test_a_queue_needs_room() -> None:
    with pytest.raises(ConfigError, match=r"^capacity=0: at least one report must be able to wait"):
        Dispatcher([], None, capacity=0)


# ------------------------------------------------------------------------ sinks that misbehave


def test_a_sink_that_fails_to_open_raises_and_closes_those_before_it() -> None:
    before, after = Recorder(), Recorder()
    dispatcher = Dispatcher([before, RaisesInOpen(), after], None)
    with pytest.raises(ConfigError) as caught:
        dispatcher.open()
    assert str(caught.value) == "a run_dir is needed"
    assert caught.value.__notes__ == ["(while the sink RaisesInOpen was opened)"]
    assert before.calls == [("open", None), "close"]
    assert after.calls == []
    dispatcher.send(report(1))
    assert before.steps == []
    assert sink_threads() == []


def test_a_sink_that_raises_is_named_once_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = RaisesAt(2), Recorder()
    dispatcher = Dispatcher([bad, good], None)
    dispatcher.open()
    for step in range(1, 6):
        dispatcher.send(report(step))
    dispatcher.close()
    assert good.steps == [1, 2, 3, 4, 5]
    assert bad.steps == [1, 2]
    assert bad.calls[-1] == "close"
    place = line_of(RaisesAt.write, 'raise OSError("the disk is full")')
    assert capsys.readouterr().err == (
        "dtrain: the sink RaisesAt failed in write() and is left out from here on: "
        f"OSError: the disk is full ({place}). Training goes on.\n"
    )
    ((name, error),) = dispatcher.failures
    assert name == "RaisesAt"
    assert isinstance(error, OSError)


def test_after_a_failure_nothing_is_queued(capsys: pytest.CaptureFixture[str]) -> None:
    bad = RaisesAt(1)
    dispatcher = Dispatcher([bad], None, capacity=1)
    dispatcher.open()
    dispatcher.send(report(1))
    for thread in threading.enumerate():
        if thread.name == "dtrain-sink-RaisesAt":
            thread.join(WAIT_S)
    for step in range(2, 10):
        dispatcher.send(report(step))
    dispatcher.close()
    assert bad.steps == [1]
    assert dispatcher.dropped == {}
    assert capsys.readouterr().err.count("\n") == 1


def test_a_failing_close_after_a_failing_write_is_a_note(
    capsys: pytest.CaptureFixture[str],
) -> None:
    dispatcher = Dispatcher([RaisesAt(1, close_too=True)], None)
    dispatcher.open()
    dispatcher.send(report(1))
    dispatcher.close()
    assert capsys.readouterr().err.count("\n") == 1
    ((_, error),) = dispatcher.failures
    assert isinstance(error, OSError)
    place = line_of(RaisesAt.close, 'raise ValueError("nor can it be closed")')
    assert error.__notes__ == [
        f"(its close() failed as well: ValueError: nor can it be closed ({place}))"
    ]


def test_a_sink_that_raises_in_close_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    sink = RaisesInClose()
    dispatcher = Dispatcher([sink], None)
    dispatcher.open()
    dispatcher.send(report(1))
    dispatcher.close()
    assert sink.steps == [1]
    place = line_of(RaisesInClose.close, 'raise ValueError("cannot be closed")')
    assert capsys.readouterr().err == (
        "dtrain: the sink RaisesInClose failed in close() and is left out from here on: "
        f"ValueError: cannot be closed ({place}). Training goes on.\n"
    )
    assert [name for name, _ in dispatcher.failures] == ["RaisesInClose"]


def test_sinks_of_one_class_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    dispatcher = Dispatcher([RaisesAt(9), RaisesAt(1)], None)
    dispatcher.open()
    dispatcher.send(report(1))
    dispatcher.close()
    assert [name for name, _ in dispatcher.failures] == ["RaisesAt (2)"]
    assert "the sink RaisesAt (2) failed" in capsys.readouterr().err


def test_a_sink_that_hangs_is_named_and_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    stuck = Gated()
    dispatcher = Dispatcher([stuck], None)
    dispatcher.open()
    for step in (1, 2, 3):
        dispatcher.send(report(step))
    assert stuck.entered.wait(WAIT_S)
    (thread,) = [t for t in threading.enumerate() if t.name == "dtrain-sink-Gated"]
    assert thread.daemon
    dispatcher.close(timeout_s=0)
    text = (
        "the sink Gated was not done after 0 s and is left behind at "
        f"{line_of(Gated.write, 'self.released.wait(WAIT_S)')}; "
        "reports that still waited for it: 2."
    )
    assert capsys.readouterr().err == f"dtrain: {text}\n"
    ((name, error),) = dispatcher.failures
    assert (name, type(error), str(error)) == ("Gated", TimeoutError, text)

    dispatcher.close(timeout_s=0)  # says nothing more
    stuck.released.set()
    thread.join(WAIT_S)
    assert stuck.calls == [("open", None), report(1)]  # nothing after it was left behind
    assert capsys.readouterr().err == ""


def test_a_closed_stderr_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    dispatcher = Dispatcher([RaisesAt(1)], None)
    dispatcher.open()
    dispatcher.send(report(1))
    dispatcher.close()
    assert [name for name, _ in dispatcher.failures] == ["RaisesAt"]


# ------------------------------------------------------------------------------ a full queue


def fill(kinds: list[ReportKind], capacity: int) -> tuple[Gated, Dispatcher]:
    """Sends step 0, which the sink hangs on, then one report of each kind, then lets it go."""
    sink = Gated()
    dispatcher = Dispatcher([sink], None, capacity=capacity)
    dispatcher.open()
    dispatcher.send(report(0))
    assert sink.entered.wait(WAIT_S)
    for step, kind in enumerate(kinds, start=1):
        dispatcher.send(report(step, kind))
    sink.released.set()
    dispatcher.close()
    return sink, dispatcher


def test_a_full_queue_drops_the_oldest_train_reports(capsys: pytest.CaptureFixture[str]) -> None:
    sink, dispatcher = fill(["eval", "train", "train", "message", "train", "eval"], capacity=4)
    assert sink.steps == [0, 1, 4, 5, 6]
    assert dispatcher.dropped == {"Gated": 2}
    assert dispatcher.failures == []
    assert capsys.readouterr().err == (
        "dtrain: the sink Gated is slower than the training: 4 reports wait for it. At step 5 "
        "some train reports begin to be left out of it. Training goes on.\n"
    )


def test_a_full_queue_without_train_reports_takes_no_new_ones() -> None:
    sink, dispatcher = fill(["start", "eval", "train", "train"], capacity=2)
    assert sink.steps == [0, 1, 2]
    assert dispatcher.dropped == {"Gated": 2}


def test_a_queue_full_of_other_reports_drops_the_oldest() -> None:
    sink, dispatcher = fill(["message", "eval", "end"], capacity=2)
    assert sink.steps == [0, 2, 3]
    assert dispatcher.dropped == {"Gated": 1}


def test_a_slow_sink_does_not_hold_up_another() -> None:
    seen = threading.Event()

    class Last(Recorder):
        def write(self, report: Report) -> None:
            super().write(report)
            if report.step == 50:
                seen.set()

    slow, quick = Gated(), Last()
    dispatcher = Dispatcher([slow, quick], None)
    dispatcher.open()
    for step in range(1, 51):
        dispatcher.send(report(step))
    assert seen.wait(WAIT_S)  # while the slow one still hangs in its first write
    assert slow.steps == []
    assert quick.steps == list(range(1, 51))
    slow.released.set()
    dispatcher.close()
    assert slow.steps == list(range(1, 51))
