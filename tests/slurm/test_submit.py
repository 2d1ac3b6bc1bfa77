"""`dtrain submit` on a real SLURM."""

import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Job

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "examples" / "digits.py")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def submit(cluster, folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "dtrain", "submit", *arguments],
        cwd=folder,
        env=cluster.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_example_on_two_nodes(cluster, tmp_path):
    options = ["--nodes=2", "--ranks=1", "--time=10:00", "--partition=main", "--name=two nodes"]
    done = submit(cluster, tmp_path, *options, DIGITS, "--epochs", "2", "--run-dir", "my run")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()[:2]
    number = first.split()[1].rstrip(":")
    assert first == f"job   {number}: {DIGITS} --epochs 2 --run-dir 'my run'"
    log = tmp_path / f"two nodes-{number}.log"
    assert second == f"log   {log}"
    assert f"squeue --job {number}" in done.stdout
    job = Job(cluster, number, tmp_path)
    assert job.wait() == ("COMPLETED", 0), job.log()
    assert "global batch 64 = 2 ranks x 2 x 16 samples" in log.read_text()
    assert "finished after 46 steps, 2 epochs: all epochs done" in log.read_text()
    assert (tmp_path / "my run" / "metrics.jsonl").exists()
    assert log.read_text().splitlines()[-1] == "dtrain: finished after 46 steps (all epochs done)"
    told = submit(cluster, tmp_path, "--status", "my run")
    assert told.returncode == 0
    lines = told.stdout.splitlines()
    assert lines[0] == "run       my run: finished, all epochs done"
    assert lines[1].startswith("step      46, as of ")
    assert lines[2].startswith(f"job       {number}: COMPLETED on n")
    assert lines[3] == "restarts  0"
    assert lines[-1] == f"log       {log}"


def test_a_sweep_and_what_does_not_fit(cluster, tmp_path):
    options = ["--cpus=1", "--sbatch=array=0-1", "--sbatch=output=logs/%A/%a.log", "--name=sweep"]
    done = submit(cluster, tmp_path, *options, DIGITS, "--epochs=1", "--run-dir=runs/{task}")
    assert done.returncode == 2
    assert "the log's folder must be there before the job has a number" in done.stderr
    options[2] = "--sbatch=output=logs/%x-%A_%a.log"
    done = submit(cluster, tmp_path, *options, DIGITS, "--epochs=1", "--run-dir=runs/{task}")
    assert (done.returncode, done.stderr) == (0, "")
    number = done.stdout.split()[1].rstrip(":")
    assert f"log   {tmp_path}/logs/sweep-{number}_*.log\n" in done.stdout
    for task in range(2):
        job = Job(cluster, f"{number}_{task}", tmp_path)
        assert job.wait() == ("COMPLETED", 0)
        log = (tmp_path / "logs" / f"sweep-{number}_{task}.log").read_text()
        assert log.splitlines()[-1] == "dtrain: finished after 23 steps (all epochs done)"
        assert (tmp_path / "runs" / str(task) / "metrics.jsonl").exists()
    done = submit(cluster, tmp_path, "--nodes=6", DIGITS)
    assert done.returncode == 2
    assert "partition main gives a job 5 nodes at most, and 6 are asked for" in done.stderr


def test_a_refusal_is_passed_on(cluster, tmp_path):
    done = submit(cluster, tmp_path, "--partition=nowhere", DIGITS)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "sbatch: error: invalid partition specified: nowhere",
        "sbatch: error: Batch job submission failed: Invalid partition name specified",
    ]
