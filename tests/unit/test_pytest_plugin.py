"""The fixtures, in a pytest of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TESTS = """
import threading
import pytest, torch
import dtrain
from dtrain.testing import RanksFailed

def ranks_sum():
    world = dtrain.init(seed=0)
    return world.comm.all_reduce("sum", torch.tensor(world.rank + 1)).item()

def rank_1_is_stuck():
    if dtrain.init().rank == 1:
        threading.Event().wait(60)
    ranks_sum()

@pytest.mark.ranks(1, 2, 4)
def test_threads(run_ranks, world_size):
    assert run_ranks(ranks_sum, world_size) == [world_size * (world_size + 1) // 2] * world_size

@pytest.mark.ranks(timeout_s=40)
def test_processes(run_processes, run_outcomes):
    assert run_processes(ranks_sum, 2) == [3, 3]
    assert [o.value for o in run_outcomes(ranks_sum, 2, env={"A": "b"})] == [3, 3]

def test_outcomes(try_ranks):
    one, two = try_ranks(lambda: 1 // dtrain.init().rank, 2)
    assert isinstance(one.error, ZeroDivisionError) and two.value == 1

@pytest.mark.ranks(timeout_s=0.5)
def test_the_marks_bound(run_ranks):
    with pytest.raises(RanksFailed, match="did not come back in time"):
        run_ranks(rank_1_is_stuck, 2, timeout_s=60)

def test_the_configured_bound(run_ranks):
    run_ranks(rank_1_is_stuck, 2)

@pytest.mark.ranks(timeout_s=0.3)
def test_the_bound_is_the_tests(run_ranks, ranks_seconds_left):
    assert 0.1 < ranks_seconds_left() <= 0.3
    for _ in range(2):
        with pytest.raises(RanksFailed):
            run_ranks(rank_1_is_stuck, 2)
    assert ranks_seconds_left() == 0.1
"""

USES_NOTHING = """
import sys

def test_without_ranks():
    assert "pytest_dtrain" in sys.modules
    assert not {"dtrain", "torch", "numpy"} & set(sys.modules)
"""


def run_pytest(folder, text):
    (folder / "test_it.py").write_text(text)
    (folder / "pytest.ini").write_text(
        "[pytest]\naddopts = --strict-markers --strict-config -rA\ndtrain_timeout = 1.5\n"
        "filterwarnings = error\n"
    )
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pytest_dtrain"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slow
def test_the_fixtures(tmp_path):
    started = time.monotonic()
    done = run_pytest(tmp_path, TESTS)
    assert time.monotonic() - started < 45
    assert done.returncode == 1, done.stdout + done.stderr
    for test in (
        *(f"test_threads[{size}]" for size in (1, 2, 4)),
        "test_processes",
        "test_outcomes",
        "test_the_marks_bound",
        "test_the_bound_is_the_tests",
    ):
        assert f"PASSED test_it.py::{test}" in done.stdout, done.stdout
    assert "FAILED test_it.py::test_the_configured_bound" in done.stdout
    assert "rank 1 did not come back in time and was left behind at test_it.py" in done.stdout
    assert "1 failed, 7 passed" in done.stdout


def test_who_does_not_use_them_pays_nothing(tmp_path):
    done = run_pytest(tmp_path, USES_NOTHING)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
