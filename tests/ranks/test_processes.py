"""dtrain.testing.run_processes: results, exceptions and deaths, by rank."""

import gc
import os
import signal
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import dtrain
from dtrain.testing import RanksFailed, run_outcomes, run_processes, tiny_fit


def ranks_and_sum():
    with dtrain.init() as world:
        return world.rank, int(world.comm.all_reduce("sum", torch.tensor(world.rank + 1)))


def raise_on(rank):
    if int(os.environ["RANK"]) == rank:
        raise ValueError(f"planted on {rank}")
    return "fine"


def die_on(rank):
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return "fine"


def wait_on(rank):
    if int(os.environ["RANK"]) == rank:
        signal.pause()


def shout():
    print("rank", os.environ["RANK"], "speaks")


def fit_and_look():
    frozen, before = gc.get_freeze_count(), {*sys.modules}
    with dtrain.init():
        tiny_fit(steps=1)
    return frozen, {name.partition(".")[0] for name in {*sys.modules} - before}


def is_left_alone():
    """Rank 0 says whether another one has left its start while rank 0 opens the last group."""
    new_group, alone = dist.new_group, []
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]))

    def opens_late(**options):
        group = new_group(**options)
        try:
            store.wait(["left"], timedelta(seconds=0.3))
            alone.append(True)
        except dist.DistStoreError:
            alone.append(False)
        return group

    if os.environ["RANK"] == "0":
        dist.new_group = opens_late
    with dtrain.init():
        store.set("left", "")
    return alone


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_by_rank(world_size):
    total = world_size * (world_size + 1) // 2
    results = run_processes(ranks_and_sum, world_size)
    assert results == [(rank, total) for rank in range(world_size)]


def test_what_a_rank_imports_is_there_before_it_is_forked():
    for frozen, imported in run_processes(fit_and_look, 2):
        assert frozen > 100_000  # objects that no rank's search for garbage goes through
        assert not imported & {"dtrain", "accelerate", "pytest", "sympy"}


def test_no_rank_leaves_its_start_before_all_are_connected():
    assert run_processes(is_left_alone, 2) == [[False], []]


def test_an_exception_names_its_rank():
    with pytest.raises(RanksFailed) as raised:
        run_processes(raise_on, 2, 1)
    assert "rank 0: fine" in str(raised.value)
    assert "rank 1: Traceback" in str(raised.value)
    first, second = raised.value.outcomes
    assert first.value == "fine"
    assert isinstance(second.error, ValueError)
    assert str(second.error) == "planted on 1"


def test_a_death_is_told_with_its_signal():
    first, second = run_outcomes(die_on, 2, 0)
    assert first.exitcode == -signal.SIGKILL
    assert "ended with code -9" in str(first.error)
    assert second.value == "fine"


@pytest.mark.slow
def test_a_stuck_rank_is_killed_and_says_where():
    first, second = run_outcomes(wait_on, 2, 1, timeout_s=10)
    assert first.error is None
    assert "did not come back in time" in str(second.error)
    assert "wait_on" in second.output


def test_output_is_kept():
    assert [o.output for o in run_outcomes(shout, 2)] == ["rank 0 speaks\n", "rank 1 speaks\n"]
