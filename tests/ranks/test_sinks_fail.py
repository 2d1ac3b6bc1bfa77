"""Sinks that raise, hang or run out of disk: training goes on, or ends on all ranks if asked to."""

import contextlib
import functools
import io
import json
import os
import resource
import signal
import sys
import threading

import tiny

import dtrain
from dtrain.errors import RemoteError, SinkError
from dtrain.sinks import Console, JSONLines
from dtrain.sinks.csv_file import CSV
from dtrain.sinks.dispatcher import Dispatcher
from dtrain.testing import run_outcomes

STEPS = 16
WAIT_S = 30.0  # how long a test waits for another thread before it fails
FULL_BYTES = 12_000  # the largest file that can be written where the "disk" is full


class RaisesIn(dtrain.Sink):
    """Raises in one of its methods; in write, at the first train report."""

    def __init__(self, method):
        self.method = method

    def fail(self, method):
        if method == self.method:
            raise ValueError(f"planted in {method}")

    def open(self, run_dir):
        self.fail("open")

    def write(self, report):
        if report.kind == "train":
            self.fail("write")

    def close(self):
        self.fail("close")


class WaitsForEver(dtrain.Sink):
    def write(self, report):
        threading.Event().wait()


class NobodyReads(dtrain.Sink):
    """Opens a pipe for writing, which nobody opens for reading."""

    def open(self, run_dir):
        self.path = run_dir / "pipe"
        os.mkfifo(self.path)

    def write(self, report):
        with self.path.open("w") as pipe:
            pipe.write("hello")


class FullDevice(dtrain.Sink):
    def write(self, report):
        with open("/dev/full", "w") as file:
            file.write("hello")


class Works(dtrain.Sink):
    """Stands beside the one that fails, and gets everything."""

    def __init__(self):
        self.steps = []

    def write(self, report):
        if report.kind == "train":
            self.steps.append(report.step)


class AwaitFailure(dtrain.Callback):
    """Before the second step, waits until the sink that fails in the first has failed."""

    def on_step_start(self, ctx, step):
        if step.number == 1:
            for thread in threading.enumerate():
                if thread.name == "dtrain-sink-RaisesIn":
                    thread.join(WAIT_S)


def many_metrics(net, batch):
    loss = tiny.loss_fn(net, batch)
    return dtrain.Loss(loss.mean, metrics={f"metric number {n:03}": 1 / 3 for n in range(50)})


def train(name, run_dir, sink=None, on_error="warn", callbacks=()):
    """Returns the end state, what ended the run, and the steps that another sink was told of."""
    print(f"=== {name}", file=sys.stderr, flush=True)
    beside = Works()
    sinks = [beside]
    if sink is not None:
        sink.on_error = on_error
        sinks.insert(0, sink)
    dtrain.init(seed=0)
    trainer = dtrain.Trainer(
        tiny.model(),
        tiny.adam,
        many_metrics,
        callbacks=callbacks,
        sinks=sinks,
        run_dir=run_dir / name,
    )
    error = None
    data = tiny.dataset()
    try:
        trainer.fit(data, batch_size=12, max_steps=STEPS, log_every=1, eval_set=data)
    except (SinkError, RemoteError, ValueError) as caught:
        error = type(caught).__name__, str(caught)
    return tiny.digest(trainer.model), error, beside.steps, trainer.context.progress.step


@contextlib.contextmanager
def small_disk():
    """Writing more than so many bytes to a file fails, as it does where the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def all_cases(folder, on_error):
    # Ten seconds are long for a test that waits for a sink that hangs.
    Dispatcher.close = functools.partialmethod(Dispatcher.close, timeout_s=0.2)
    found = {"none": train("none", folder)}
    for name, sink, callbacks in (
        ("write", RaisesIn("write"), [AwaitFailure()]),
        ("close", RaisesIn("close"), []),
        ("event", WaitsForEver(), []),
        ("pipe", NobodyReads(), []),
        ("device", FullDevice(), []),
        ("open", RaisesIn("open"), []),
    ):
        found[name] = train(name, folder, sink, on_error, callbacks)
    with small_disk():
        found["lines"] = train("lines", folder, JSONLines(), on_error)
        found["table"] = train("table", folder, CSV(), on_error)
        if dtrain.init(seed=0).is_main:
            (folder / "console.txt").touch()
        raw = io.FileIO(folder / "console.txt", "a")
        with io.TextIOWrapper(raw, write_through=True) as stream:
            found["console"] = train("console", folder, Console(stream), on_error)
    found["none again"] = train("none again", folder)
    return found


def run(tmp_path, on_error):
    """Returns each rank's outcomes by case, and what each wrote by case."""
    outcomes = run_outcomes(all_cases, 2, tmp_path, on_error)
    assert [outcome.error for outcome in outcomes] == [None, None], outcomes[0].trace
    said = []
    for outcome in outcomes:
        parts = outcome.output.split("=== ")[1:]
        said.append({part.partition("\n")[0]: part.partition("\n")[2] for part in parts})
    return [outcome.value for outcome in outcomes], said


FAILS = {
    "write": ("RaisesIn", "ValueError: planted in write"),
    "device": ("FullDevice", "OSError: [Errno 28] No space left on device"),
    "lines": ("JSONLines", "OSError: [Errno 27] File too large"),
    "table": ("CSV", "OSError: [Errno 27] File too large"),
    "console": ("Console", "OSError: [Errno 27] File too large"),
}
HANGS = {"event": "WaitsForEver", "pipe": "NobodyReads"}


def check_end_states(found, cases):
    # A sink that cannot be opened ends the run before it begins, in either case.
    assert found[0]["open"][1:] == (("ValueError", "planted in open"), [], 0)
    (kind, text) = found[1]["open"][1]
    assert kind == "RemoteError"
    assert "ValueError: planted in open" in text
    for one in found:
        digest = found[0]["none"][0]
        for name in cases:
            assert one[name][0] == digest, name
            assert one[name][3] == STEPS
    for name in cases:
        assert found[0][name][2] == list(range(1, STEPS + 1)), name  # its neighbour got everything
        assert found[1][name][2] == []


def test_training_goes_on_without_a_sink_that_fails(tmp_path):
    found, said = run(tmp_path, "warn")
    survived = ["none", "none again", "close", *FAILS, *HANGS]
    check_end_states(found, survived)
    assert all(one[name][1] is None for one in found for name in survived)
    for name, (sink, what) in FAILS.items():
        line = said[0][name]
        assert line.count("\n") == 1
        start = f"dtrain: the sink {sink} failed in write() and is left out from here on: {what} ("
        assert line.startswith(start)
        assert line.endswith("). Training goes on.\n")
    assert said[0]["close"].startswith(
        "dtrain: the sink RaisesIn failed in close() and is left out from here on: ValueError: "
        "planted in close ("
    )
    for name, sink in HANGS.items():
        assert said[0][name].startswith(
            f"dtrain: the sink {sink} was not done after 0.2 s and is left behind at {__file__}:"
        )
        assert "; reports that still waited for it: " in said[0][name]
    assert said[0]["none"] == said[0]["none again"] == ""
    assert set(said[1].values()) == {""}  # the sinks are rank 0's
    # What was written before there was no more room is whole but for its end.
    lines = (tmp_path / "lines" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:-1]] == list(range(1, len(lines)))
    assert 3 < len(lines) < STEPS
    status = json.loads((tmp_path / "write" / "status.json").read_text())
    assert (status["status"], status["step"]) == ("finished", STEPS)


def test_on_error_raise_ends_the_run_on_all_ranks(tmp_path):
    found, said = run(tmp_path, "raise")
    # A run that waits for its sinks at the end is trained whole; `fit` raises all the same.
    check_end_states(found, ["none", "none again", "close", *HANGS])
    for name, (sink, what) in FAILS.items():
        (kind, text), (other_kind, other_text) = (one[name][1] for one in found)
        told = f"the sink {sink} failed, and on_error='raise': {what} ("
        assert kind == "SinkError"
        assert text.startswith(told)
        assert other_kind == "RemoteError"
        assert other_text.startswith("rank 0 on ")
        assert f": SinkError: {told}" in other_text
        assert said[0][name].endswith("). The run is stopped.\n")
        assert found[0][name][3] == found[1][name][3]
    # The sink failed with the first report; the next one is the first sync point after it.
    assert found[0]["write"][3] == 2
    status = json.loads((tmp_path / "write" / "status.json").read_text())
    assert (status["status"], status["step"]) == ("failed", 2)
    assert status["reason"].startswith("SinkError: the sink RaisesIn failed")
    for name, words in (
        ("close", "the sink RaisesIn failed, and on_error='raise': ValueError: planted in close"),
        ("event", "TimeoutError: the sink WaitsForEver was not done after 0.2 s"),
        ("pipe", "TimeoutError: the sink NobodyReads was not done after 0.2 s"),
    ):
        assert found[0][name][1][0] == "SinkError"
        assert words in found[0][name][1][1]
        assert found[1][name][1][0] == "RemoteError"
        assert words in found[1][name][1][1]
