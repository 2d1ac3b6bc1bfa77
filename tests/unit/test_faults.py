"""Faults on ranks that are threads: where and when they happen, and which are refused."""

import threading
import time

import pytest

import dtrain
from dtrain.callback import HOOK_NAMES
from dtrain.callbacks import Checkpoint
from dtrain.distributed.world import current
from dtrain.errors import ConfigError, RemoteError
from dtrain.testing import Delay, Fault, Kill, Raise, Signal, Stop, run_ranks, tiny_fit, try_ranks


class Watch(dtrain.Callback):
    """Keeps where each rank was when the fault happened."""

    def __init__(self, fault):
        self.fault = fault
        self.error = None

    def on_error(self, ctx, error):
        self.error = (ctx.progress.step, self.fault.happened, type(error))


@pytest.mark.parametrize("hook", [hook for hook in HOOK_NAMES if hook != "on_error"])
def test_a_fault_in_any_hook_reaches_all_ranks(hook, tmp_path):
    of_a_step = hook in ("on_step_start", "on_batch", "on_loss", "on_grads_ready", "on_step_end")
    step = 2 if of_a_step else 0
    seen = {}

    def fn():
        fault = Fault(Raise(OSError("planted")), rank=1, step=step, hook=hook)
        watch = seen[current().rank] = Watch(fault)
        tiny_fit([fault, watch, Checkpoint()], run_dir=tmp_path)

    outcomes = try_ranks(fn, 3)
    assert [type(o.error) for o in outcomes] == [RemoteError, OSError, RemoteError]
    for rank, outcome in enumerate(outcomes):
        assert seen[rank].error[1] is (rank == 1)
        if rank != 1:
            assert "rank 1 on" in str(outcome.error)
            assert f"failed in {hook} at step" in str(outcome.error)
            assert "OSError: planted (" in str(outcome.error)
    if of_a_step:
        # After the reduction, the other ranks take the step.
        assert seen[1].error[0] == (3 if hook in ("on_grads_ready", "on_step_end") else 2)


def test_a_fault_while_an_error_is_handled_becomes_a_note():
    def fn():
        tiny_fit(
            [
                Fault(Raise(OSError("first")), rank=0, step=1),
                Fault(Raise(ValueError("second")), rank=1, hook="on_error"),
            ]
        )

    one, two = try_ranks(fn, 2)
    assert type(one.error) is OSError
    assert type(two.error) is RemoteError
    assert "on_error raised as well: ValueError('second')" in two.error.__notes__[0]


@pytest.mark.parametrize("what", [Kill(), Stop(), Signal(15)])
def test_what_would_hit_the_whole_process_is_refused_by_name(what):
    for outcome in try_ranks(lambda: tiny_fit([Fault(what, rank=1, step=1)]), 2):
        assert type(outcome.error) is ConfigError
        assert f"{type(what).__name__} is for a process" in str(outcome.error)
        assert "run_processes" in str(outcome.error)


def test_a_delay_keeps_one_rank_and_changes_nothing():
    plain = run_ranks(lambda: tiny_fit().losses, 2)
    started = time.monotonic()
    late = run_ranks(lambda: tiny_fit([Fault(Delay(0.3), rank=1, step=2)]).losses, 2)
    assert time.monotonic() - started >= 0.3
    assert late == plain


def test_a_delay_lasts_until_another_rank_is_there():
    came, order = threading.Event(), []

    class Come(dtrain.Callback):
        def on_batch(self, ctx, step):
            if current().rank == 1 and step.number == 2:
                order.append("rank 1 comes")
                came.set()

        def on_loss(self, ctx, step):
            if current().rank == 0 and step.number == 2:
                order.append("rank 0 goes on")

    run_ranks(lambda: tiny_fit([Fault(Delay(came), rank=0, step=2), Come()]), 2)
    assert order == ["rank 1 comes", "rank 0 goes on"]


def test_an_event_that_does_not_happen_is_an_error():
    fault = lambda: Fault(Delay(threading.Event(), timeout_s=0.1), rank=0)  # noqa: E731
    one, two = try_ranks(lambda: tiny_fit([fault()]), 2)
    assert type(one.error) is TimeoutError
    assert type(two.error) is RemoteError


def test_a_fault_that_never_happens_is_an_error():
    one, two = try_ranks(lambda: tiny_fit([Fault(Raise(OSError()), rank=1, step=99)], steps=4), 2)
    assert "Fault at on_loss of step 99 on rank 1 never happened: the run ended well after 4" in (
        str(two.error)
    )
    assert type(one.error) is RemoteError


def test_what_cannot_be_planted_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'on_loss'"):
        Fault(Kill(), rank=0, hook="on_los")
    with pytest.raises(ConfigError, match="0 or more"):
        Fault(Kill(), rank=-1)
    with pytest.raises(ConfigError, match="0 or more"):
        Fault(Kill(), rank=0, step=-1)
    for outcome in try_ranks(lambda: tiny_fit([Fault(Raise(OSError()), rank=2)]), 2):
        assert "there are 2 ranks, counted from 0" in str(outcome.error)
