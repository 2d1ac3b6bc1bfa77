"""dtrain.testing.run_processes: results, exceptions and deaths, by rank."""

import os
import signal

import pytest
import torch

import dtrain
from dtrain.testing import RanksFailed, run_outcomes, run_processes


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


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_by_rank(world_size):
    total = world_size * (world_size + 1) // 2
    results = run_processes(ranks_and_sum, world_size)
    assert results == [(rank, total) for rank in range(world_size)]


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
