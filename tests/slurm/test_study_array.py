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
    """Returns all that was measured, by run, and what is said of it."""
    found = {}
    for file in sorted(study.glob("*/seed-*/metrics.jsonl")):
        rows = map(json.loads, file.read_text().splitlines())
        found[f"{file.parent.parent.name}/{file.parent.name}"] = [
            {key: value for key, value in row.items() if key != "seconds"}
            for row in rows
            if row["kind"] == "eval"  # when training is told of goes by the clock
        ]
    for row in json.loads((study / "table.json").read_text())["rows"]:
        found[row["variant"]] = [row[key] for key in ("mean", "spread", "difference", "p")]
    return found


def test_an_array_gives_the_table_that_this_machine_gives(cluster, tmp_path):
    """With a run that is requeued in its middle, one that fails, and one that never trains."""
    (tmp_path / "slow").touch()  # so that runs can be met in their middle
    first = ["--without=EMA", "--set=Breaks.at=11", "--arg=--unknown", "--seeds=1"]
    done = dtrain(cluster, tmp_path, "ablate", *first, "--folder=my study", *SLURM, str(SCRIPT))
    job = done.stdout.split()[1].rstrip(":")
    assert f"{job}_0 is task 0 of the array 0-3; scancel {job} ends all of them" in done.stdout
    assert done.stdout.splitlines()[-3:] == [
        "runs  4, a task each, which names its run in its log's first line",
        "then  dtrain compare 'my study'      the table of what there is so far",
        "      the same command again: submits what is missing; where nothing is, writes the table "
        "and the picture",
    ]
    # Another seed, while they are at work: only its own.
    second = ["--without=EMA", "--seeds=2"]
    asked = ["ablate", *second, "--folder=my study", *SLURM, str(SCRIPT)]
    done = dtrain(cluster, tmp_path, *asked, "--jobs=1")
    assert f" of its runs are in SLURM's queue already (job {job})" in done.stderr
    other = done.stdout.split()[1].rstrip(":")
    assert f"{other}_4 is task 4 of the array 4-5%1; scancel {other} ends all" in done.stdout
    study = tmp_path / "my study"
    status = study / "without-EMA" / "seed-0" / "status.json"
    wait_for("checkpoint", lambda: status.exists() and json.loads(status.read_text())["saved"] > 0)
    tasks = [Job(cluster, f"{job}_{task}", study) for task in range(4)]
    tasks += [Job(cluster, f"{other}_{task}", study) for task in (4, 5)]
    tasks[1].signal()
    wait_for("end", lambda: json.loads(status.read_text())["status"] == "preempted")
    (tmp_path / "slow").unlink()
    dtrain(cluster, tmp_path, "ablate", *second, "--folder=here", str(SCRIPT))
    done, failed = ("COMPLETED", 0), ("FAILED", 0)
    ended = [task.wait() for task in tasks]
    assert ended == [done, ("COMPLETED", 1), ("FAILED", 2), failed, done, done]
    logs = [(study / f"slurm-{task}.log").read_text().splitlines() for task in range(6)]
    told = f"dtrain ablate: run 1 of the study: without EMA, seed 0, in {status.parent}"
    assert logs[1][0] == told
    assert logs[1].count(told) == 2
    assert logs[1][-1] == logs[5][-1] == "dtrain: finished after 100 steps (all epochs done)"
    words = "(ValueError: planted at 11), saved at step 10: not requeued"
    assert logs[2][-1].startswith("dtrain: failed 3 times in a row, never beyond step ")
    assert logs[2][-1].endswith(words)
    # Now nothing is missing, and what has failed is not run again.
    done = dtrain(cluster, tmp_path, *asked)
    assert done.stderr.startswith("  what the script has ...\n\nfiles and picture are in my study")
    there, here = figures(study), figures(tmp_path / "here")
    assert {name: there[name] for name in here} == here
    assert len(here) == 6
    for name, error in (
        ("Breaks.at=11", "ValueError: planted at 11"),
        ("--unknown", "AssertionError: such an argument is unknown"),
    ):
        assert f"{name}: failed in 1 of 1 seeds, the base in none ({error});" in done.stdout
