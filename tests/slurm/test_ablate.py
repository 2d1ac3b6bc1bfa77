"""`dtrain ablate --slurm`: a study as an array of jobs gives the table that it gives here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Job, wait_for

SCRIPT = Path(__file__).with_name("slurm_study.py")
SLURM = ("--slurm", "--sbatch=cpus-per-task=1")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


def dtrain(cluster, folder, *arguments, status=0):
    # One core: so one thread, as each task of the array has.
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", *arguments],
        cwd=folder,
        env=cluster.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def figures(study):
    """Returns all that was measured, by run."""
    found = {}
    for file in sorted(study.glob("*/seed-*/metrics.jsonl")):
        rows = map(json.loads, file.read_text().splitlines())
        found[f"{file.parent.parent.name}/{file.parent.name}"] = [
            {key: value for key, value in row.items() if key != "seconds"} for row in rows
        ]
    return found


def run_of(study, place):
    return json.loads((study / place / "run.json").read_text())


def test_an_array_gives_the_table_that_this_machine_gives(cluster, tmp_path):
    (tmp_path / "slow").touch()  # so that a job can be met in the middle
    asked = ["ablate", "--without=EMA", "--seeds=2", "--folder=my study"]
    done = dtrain(cluster, tmp_path, *asked, *SLURM, str(SCRIPT))
    lines = done.stdout.splitlines()
    number = lines[0].split()[1].rstrip(":")
    assert f"scancel {number} ends all of them" in done.stdout
    assert lines[-3:] == [
        "runs  4, a task each, which names its run in its log's first line",
        "then  dtrain compare 'my study'      the table of what there is so far",
        "      the same command again: submits what is missing; where nothing is, writes the table "
        "and the picture",
    ]
    study = tmp_path / "my study"
    status = study / "without-EMA" / "seed-0" / "status.json"
    wait_for("checkpoint", lambda: status.exists() and json.loads(status.read_text())["saved"] > 0)
    # Asked again meanwhile, nothing is done twice: not here, and not there.
    done = dtrain(cluster, tmp_path, *asked, str(SCRIPT))
    assert f"4 of its runs are in SLURM's queue already (job {number})" in done.stderr
    assert "1 of " not in done.stderr
    tasks = [Job(cluster, f"{number}_{task}", study) for task in range(4)]
    tasks[1].signal()
    wait_for("preemption", lambda: json.loads(status.read_text())["status"] == "preempted")
    (tmp_path / "slow").unlink()
    assert [task.wait() for task in tasks] == [
        ("COMPLETED", restarts) for restarts in (0, 1, 0, 0)
    ]
    log = (study / "slurm-1.log").read_text().splitlines()
    told = f"dtrain ablate: run 1 of the study: without EMA, seed 0, in {status.parent}"
    assert log[0] == told and log.count(told) == 2
    assert any("resumed" in line for line in log), log
    assert log[-1] == "dtrain: finished after 100 steps (all epochs done)"
    table = dtrain(cluster, tmp_path, "compare", "my study").stdout
    here = dtrain(cluster, tmp_path, *asked[:-1], "--folder=here", str(SCRIPT))
    assert here.stdout == table
    assert figures(study) == figures(tmp_path / "here")
    assert len(figures(study)) == 4

    # Another seed: only its runs, and two that fail, one of them before it trains.
    more = ["--set=Breaks.at=25", "--arg=--unknown", "--seeds=0,5"]
    done = dtrain(cluster, tmp_path, *asked, *more, *SLURM, str(SCRIPT))
    again = done.stdout.split()[1].rstrip(":")
    assert f"task 4 of the array 4-9; scancel {again}" in done.stdout
    tasks = {task: Job(cluster, f"{again}_{task}", study) for task in range(4, 10)}
    ended = {task: job.wait()[0] for task, job in tasks.items()}
    assert ended == {4: "FAILED"}, ended
