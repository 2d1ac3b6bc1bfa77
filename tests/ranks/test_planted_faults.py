"""Faults on real ranks: killed, stopped, late, or sent a signal."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

import dtrain
from dtrain.errors import RemoteError
from dtrain.testing import Delay, Fault, Kill, Signal, Stop, run_outcomes, run_processes, tiny_fit

TIMEOUT_S = 60


class Wake(dtrain.Callback):
    """On rank 0: waits until the other rank's process is stopped, and has it go on."""

    def __init__(self, pid):
        self.pid = pid
        self.stopped_at = None

    def on_loss(self, ctx, step):
        if step.number == 3 and self.pid != os.getpid():
            deadline = time.monotonic() + 20
            while self.state() != "T" and time.monotonic() < deadline:
                threading.Event().wait(0.01)
            self.stopped_at = self.state()
            os.kill(self.pid, signal.SIGCONT)

    def state(self):
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0]


def survived():
    """Faults after which a run goes on; returns the losses of each, and what was noticed."""
    world = dtrain.init(seed=0)
    pids = world.comm.gather_objects("pids", os.getpid())
    caught = []
    signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    fits = [tiny_fit()]
    wake = Wake(pids[1])
    fits.append(tiny_fit([Fault(Stop(), rank=1, step=3, hook="on_batch"), wake]))
    fits.append(tiny_fit([Fault(Signal(signal.SIGUSR1), rank=1, step=2)]))
    started = time.monotonic()
    fits.append(tiny_fit([Fault(Delay(0.3), rank=0, step=1, hook="on_step_start")]))
    took = time.monotonic() - started
    return [fit.losses for fit in fits], wake.stopped_at, caught, took


def test_a_rank_that_is_stopped_late_or_sent_a_signal_goes_on_to_the_same_losses():
    one, two = run_processes(survived, 2, timeout_s=TIMEOUT_S)
    assert one[0] == two[0] == [one[0][0]] * 4
    assert one[1] == "T"
    assert (one[2], two[2]) == ([], [signal.SIGUSR1])
    assert min(one[3], two[3]) >= 0.3


def killed():
    dtrain.init(seed=0, timeout_s=20)
    tiny_fit([Fault(Kill(), rank=1, step=2, hook="on_eval_batch")])


def test_a_rank_that_is_killed_is_missed():
    one, two = run_outcomes(killed, 2, timeout_s=TIMEOUT_S)
    assert two.exitcode == -signal.SIGKILL
    assert type(one.error) is RemoteError
    assert "its process is gone" in str(one.error)


def test_in_one_process_a_fault_is_this_ranks():
    with pytest.raises(OSError, match="planted"):
        tiny_fit([Fault(Raised(), rank=0, step=1)])


class Raised:
    """A kind of fault of one's own."""

    in_threads = True

    def happen(self):
        raise OSError("planted")
