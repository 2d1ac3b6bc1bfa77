"""A run that fails at the same step, start after start, is not started for ever."""

import json
import os
import signal
import subprocess
import sys

import pytest
import tiny

import dtrain
from dtrain.callbacks import Checkpoint
from dtrain.errors import CrashLoop, RemoteError
from dtrain.testing import run_outcomes

STEPS = 10


class Breaks(dtrain.Callback):
    """Raises, or is killed, on rank 1 at one step."""

    def __init__(self, how, step):
        self.how, self.step = how, step

    def on_batch(self, ctx, step):
        if dtrain.init(seed=0).rank != 1 or step.number != self.step:
            return
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "raises":
            raise ValueError("planted")


def start(run_dir, how, step):
    dtrain.init(seed=0)
    run = tiny.trainer([Checkpoint(every_steps=2), Breaks(how, step)], run_dir=run_dir)
    return run.fit(tiny.dataset(), batch_size=16, max_steps=STEPS).steps


def attempt(run_dir, how, step, restart):
    """Returns the outcomes, and what is left in status.json."""
    env = {"TORCHELASTIC_RESTART_COUNT": str(restart)}
    outcomes = run_outcomes(start, 2, run_dir, how, step, env=env, timeout_s=30)
    status = json.loads((run_dir / "status.json").read_text())
    return outcomes, (status["status"], status["failures"], status["requeue"])


@pytest.mark.parametrize("how", ["raises", "killed"])
def test_a_fourth_start_at_the_same_step_gives_up(tmp_path, how):
    left = "failed"  # also where rank 1 was killed: rank 0 noticed
    for count in (1, 2, 3):
        _, status = attempt(tmp_path, how, 5, count - 1)
        assert status == (left, count, count < 3)
    (zero, one), status = attempt(tmp_path, how, 5, 3)
    assert type(zero.error) is CrashLoop
    assert zero.error.code == 78
    assert "3 starts in a row came no further than step 5 (" in zero.output
    assert type(one.error) is RemoteError
    assert "3 starts in a row came no further than step 5" in str(one.error)
    assert status == (left, 3, False)
    # Somebody has mended it: a start by hand counts from 1.
    outcomes, status = attempt(tmp_path, "", 0, 0)
    assert [outcome.value for outcome in outcomes] == [STEPS] * 2
    assert status == ("finished", 0, False)


def killed_together(run_dir):
    """All ranks at once, as a machine that goes down: nobody can tell."""

    class Dies(dtrain.Callback):
        name = "Breaks"

        def on_batch(self, ctx, step):
            if step.number == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    dtrain.init(seed=0)
    run = tiny.trainer([Checkpoint(every_steps=2, background=False), Dies()], run_dir=run_dir)
    run.fit(tiny.dataset(), batch_size=16, max_steps=STEPS)


def test_starts_that_are_killed_are_counted_by_the_next(tmp_path):
    for restart in range(3):
        env = {"TORCHELASTIC_RESTART_COUNT": str(restart)}
        (outcome,) = run_outcomes(killed_together, 1, tmp_path, env=env, timeout_s=30)
        assert outcome.exitcode == -signal.SIGKILL
    (outcome,) = run_outcomes(
        killed_together, 1, tmp_path, env={"SLURM_RESTART_COUNT": "3"}, timeout_s=30
    )
    assert type(outcome.error) is CrashLoop
    assert "3 starts in a row came no further than step 4 (killed)" in str(outcome.error)


def test_starts_that_come_further_are_not_counted(tmp_path):
    for restart, step in enumerate((3, 5, 7, 9)):
        _, status = attempt(tmp_path, "raises", step, restart)
        assert status == ("failed", 1, True)


def test_uncaught_it_ends_the_process_with_its_code():
    script = "from dtrain.errors import CrashLoop; raise CrashLoop('not again')"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 78
