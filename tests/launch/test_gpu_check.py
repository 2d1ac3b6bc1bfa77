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
SOME = "fp16 and (waits_for_the_device or scale) or can_fail or last_bucket or late_votes"


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
    figures = tmp_path / "gpu.json"
    few = ["--tiny", "--device", "cpu", "--rounds", "2", "--block", "3", "--json", str(figures)]
    run("benchmarks/gpu.py", *few, "--loops", "dtrain", "accelerate")
    loops = json.loads(figures.read_text())["loops"]
    assert list(loops) == ["tuned", "dtrain", "accelerate"]
    assert loops["dtrain"]["loss"] == pytest.approx(loops["tuned"]["loss"], rel=1e-4)


def test_the_script_says_what_it_cannot_do():
    found = subprocess.run(
        [ROOT / "launch" / "gpu_check.sh"],
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 1
    assert "torch sees no GPU here; --dry-run needs none" in found.stderr
