"""A rank that holds up the others is named, with what it waits for."""

import socket
import time

import pytest
import tiny
import torch

import dtrain
from dtrain.testing import run_processes
from dtrain.watchdog import straggler


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Others:
    """Stands for the other ranks: they say the same again and again."""

    def __init__(self, rows):
        self.rows = rows
        self.sent = []

    def all_gather(self, label, mine):
        self.sent.append(mine.tolist())
        return torch.cat([mine[None], torch.tensor(self.rows, dtype=torch.float64)])

    def gather_objects(self, label, value):
        return [value, "b", "c", "d"]


def steps(one, clock, count, *, data=1.0, forward=2.0, backward=4.0, update=8.0):
    for _ in range(count):
        one.begin_step()
        since = clock()
        clock.now += data
        one.waited_for_data(since)
        clock.now += forward
        one.forwarded()
        clock.now += backward
        one.reduced()
        clock.now += update
        one.end_step()


def test_own_work_is_what_does_not_wait_for_others(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(straggler, "perf_counter", clock)
    others = Others([[11.0, 1.0, 15.0], [11.0, 1.0, 15.0], [12.0, 1.0, 15.0]])
    one = straggler.StragglerClock(others, host="a", size=4)
    steps(one, clock, 1, forward=1000.0)  # the first warms up
    steps(one, clock, 19)
    assert one.compare(300.0) == ""
    assert others.sent == []  # too few steps to compare
    steps(one, clock, 1)
    assert one.seconds == 300.0
    assert one.compare(0.99) == ""
    assert others.sent == []  # too little time, and this rank's own does not count
    assert one.compare(300.0) == ""
    assert others.sent == [[11.0, 1.0, 15.0]]
    steps(one, clock, 20)
    steps(one, clock, 1, forward=45.0)  # the whole job was suspended: nobody's work
    assert one.compare(300.0) == ""
    assert others.sent[-1][:2] == [11.0, 1.0]
    steps(one, clock, 20, data=20.0)
    told = (
        "rank 0 on a holds up the others: its own work takes 30 s a step, 20 s of it waiting for "
        "data, where the median rank's takes 11 s"
    )
    assert one.compare(300.0) == told
    steps(one, clock, 20, data=20.0)
    assert one.compare(300.0) == ""  # it was told
    # Half as much again, but too little of a step to be worth a word.
    others.rows = [[1.0, 0.0, 100.0]] * 3
    quick = straggler.StragglerClock(others, host="a", size=4)
    steps(quick, clock, 21, data=0.0, forward=1.6, backward=98.4, update=0.0)
    assert quick.compare(300.0) == ""


def busy(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class Rows:
    def __init__(self, slow):
        self.data, self.slow = tiny.dataset(), slow

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        if self.slow:
            busy(0.01)
        return self.data[row]


class Says(dtrain.Sink):
    def __init__(self):
        self.texts = []

    def write(self, report):
        if report.kind == "message":
            self.texts.append(report.text)


def slow_on_rank_1(what):
    rank = dtrain.init(seed=0).rank

    def loss_fn(net, batch):
        if what == "loss" and rank == 1:
            busy(0.04)
        return tiny.loss_fn(net, batch)

    says = Says()
    run = dtrain.Trainer(tiny.model(), tiny.adam, loss_fn, sinks=[says])
    run.fit(Rows(what == "data" and rank == 1), batch_size=8, max_steps=50, log_every=25)
    return says.texts


@pytest.mark.parametrize("what", ["data", "loss"])
def test_a_slow_rank_is_named_once(what):
    texts, none = run_processes(slow_on_rank_1, 2, what)
    assert none == []  # rank 0 tells
    (told,) = [text for text in texts if "holds up the others" in text]
    assert f"warning: rank 1 on {socket.gethostname()} holds up" in told
    own, data = (float(part.split()[-1]) for part in told.split(" s ")[:2])
    assert own >= 0.04
    assert (data >= 0.04) == (what == "data")
