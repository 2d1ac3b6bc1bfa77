"""What launch/gpu_check.sh runs on a GPU still runs: part of it, as its dry run, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent

#: The others differ in numbers only, or take long.
SOME = "fp16 and (waits_for_the_device or scale) or can_fail or last_bucket or late_votes or resume"


def run(*command, **variables):
    found = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-5000:]
    return found.stdout


def test_a_dry_run_passes(tmp_path):
    told = run("-m", "pytest", "-q", "tests/gpu", "--device", "cpu", "-k", SOME)
    assert " passed" in told
    assert "failed" not in told


def test_so_does_the_benchmark(tmp_path):
    figures = tmp_path / "gpu.json"
    few = ["--tiny", "--device", "cpu", "--rounds", "2", "--json", str(figures)]
    few += ["--models", "mlp", "gpt", "--parts", "syncs", "checkpoint"]
    told = run("benchmarks/gpu.py", *few, "--loops", "dtrain", "dtrain, five", "captured", "reduce")
    found = json.loads(figures.read_text())
    mlp, gpt = (found["models"][name]["loops"] for name in ("mlp", "gpt"))
    assert list(mlp) == ["tuned", "dtrain", "dtrain, five", "captured", "reduce"]
    assert list(gpt) == ["tuned", "dtrain"]
    for loops in (mlp, gpt):
        for one in loops.values():
            assert one["loss"] == pytest.approx(loops["tuned"]["loss"], rel=1e-4)
            assert len(one["block_seconds"]) == 2
    limits = {one["what"]: one["limit"] for one in found["verdicts"]}
    assert limits["mlp: dtrain / tuned"] == 1.15
    assert limits["gpt: dtrain / tuned"] == 0.995
    assert limits["syncs: with all usual callbacks"] == 0
    assert limits["checkpoint: first background save, in copies"] == 1.5
    assert found["parts"]["syncs"] == {"steps": 104, "count": 0, "which": [], "planted": 104}
    for one in found["verdicts"]:
        assert one["within"] == (one["value"] <= one["limit"])
        assert f"{'within' if one['within'] else 'over':7} {one['what']}" in told


def test_it_ends_early_where_time_is_short(tmp_path):
    figures = tmp_path / "gpu.json"
    few = ["--tiny", "--device", "cpu", "--rounds", "50", "--json", str(figures), "--seconds", "0"]
    told = run("benchmarks/gpu.py", *few, "--models", "mlp", "--loops", "dtrain")
    found = json.loads(figures.read_text())
    assert found["models"]["mlp"]["rounds"] == 2
    assert "2 of 50 rounds of 3 steps" in told
    assert found["parts"]["start"] == {"left_out": "0 s were left, of the 15 that it may take"}


def test_the_script_says_what_it_cannot_do(tmp_path):
    found = subprocess.run(
        [ROOT / "launch" / "gpu_check.sh"],
        env=os.environ
        | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 1
    assert "torch sees no GPU here; --dry-run needs none" in found.stderr


#: Runs what asks what there is; tests and benchmarks only say that they were called.
FAKE = """#!/bin/sh
case "$*" in
*test_late_votes*) echo "it fails"; exit 3 ;;
"-m pytest"*|*benchmarks/gpu.py*) echo "called: $*"; exit 0 ;;
esac
exec {python} "$@"
"""


@pytest.mark.parametrize("cores", [1, 32])
def test_all_parts_run_also_after_one_has_failed(tmp_path, cores):
    for name, text in {
        "python": FAKE.format(python=sys.executable),
        "nproc": f"echo {cores}",
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(
        [ROOT / "launch" / "gpu_check.sh", "--dry-run"],
        env=os.environ | {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path), "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 1, found.stderr
    said = (tmp_path / "gpu_check.txt").read_text()
    assert said == found.stdout
    _, summary = said.split("=== summary")
    failed = [line for line in summary.splitlines() if "FAILED" in line]
    assert len(failed) == 1
    assert failed[0].startswith("votes and errors a step late")
    assert "FAILED with status 3" in failed[0]
    assert summary.count(" passed, ") == said.count("called: ")
    # One after the other in the log, and the benchmark after all tests.
    assert said.index("it fails") < said.index("benchmarks/gpu.py --json")
