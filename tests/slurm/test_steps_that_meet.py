"""Steps and jobs of a real SLURM that would meet at one port, or wait for tasks that never come."""

import re

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPT = """
import os, sys, threading
import dtrain
try:
    world = dtrain.init(timeout_s=float(sys.argv[2]))
except dtrain.LaunchError as error:
    print(f"{sys.argv[1]}: LaunchError: {error}", flush=True)
    sys.exit(1)
names = world.comm.gather_objects("names", sys.argv[1])
print(f"{sys.argv[1]}: {names} at {os.environ['MASTER_PORT']}", flush=True)
go = sys.argv[3] if len(sys.argv) > 3 else ""
while go and not os.path.exists(go):
    threading.Event().wait(0.1)
"""


def batch(cluster, folder, lines, **env):
    """Submits a batch script of such lines on the first node; returns the job."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.py").write_text(SCRIPT)
    script = folder / "job.sh"
    script.write_text("\n".join(["#!/bin/bash", *lines, "wait", ""]))
    options = ["--nodelist=n1", "--ntasks=4", "--overcommit", "--output=log", "--no-requeue"]
    return cluster.submit(folder, script, options=options, **env)


def step(name, timeout_s=100, more="", options="--overlap -n2"):
    return f'srun {options} "$PYTHON" train.py {name} {timeout_s} {more}'


def test_two_steps_of_an_allocation_do_not_meet(cluster, tmp_path):
    job = batch(cluster, tmp_path, [step("a") + " &", step("b") + " &"])
    job.wait()
    log = (tmp_path / "log").read_text()
    for name in "ab":
        assert log.count(f"{name}: ['{name}', '{name}'] at ") == 2, log
    assert len(set(re.findall(r"\] at (\d+)", log))) == 2, log


def test_two_steps_with_one_exported_port(cluster, tmp_path):
    """The one that comes second ends, on all its tasks, and names the first; that one goes on."""
    go = tmp_path / "go"
    first = step("a", more=str(go)) + " & first=$!"
    until = 'until grep -q "a: " log; do sleep 0.2; done'
    lines = ["export MASTER_PORT=23456", first, until, step("b"), f"touch {go}", "wait $first"]
    job = batch(cluster, tmp_path, [*lines, 'echo "first ended with $?"'])
    job.wait()
    log = (tmp_path / "log").read_text()
    assert log.count("a: ['a', 'a'] at 23456") == 2, log
    assert "first ended with 0" in log
    told = re.findall(r"b: LaunchError: (.*)", log)
    assert len(told) == 2, log
    for words in told:
        assert "another dtrain job (2 ranks, of which rank 0 is process " in words
        assert f"SLURM job {job.number}, step 0)" in words
        assert "Set MASTER_PORT to a free port" in words


def test_a_shell_of_two_tasks_says_which_never_comes(cluster, tmp_path):
    """As with ``srun -n2 --pty bash``, where one types ``python train.py``."""
    only_first = "srun -n2 bash -c '[ $SLURM_PROCID = 1 ] || exec \"$PYTHON\" train.py a 12'"
    job = batch(cluster, tmp_path, [only_first])
    job.wait()
    log = (tmp_path / "log").read_text()
    assert ": waiting for rank 1 of 2 (SLURM_STEP_NUM_TASKS=2) (for 10 s; in another" in log
    assert "LaunchError: still missing after 12 s (dtrain.init(timeout_s=...)): rank 1 of 2 " in log
