"""The examples and the README's code run as they are, however they are launched."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLEAN = {
    "OMP_NUM_THREADS": "1",  # ranks share two cores
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]


def run(command, cwd=ROOT):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | CLEAN,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def evaluations(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "eval"]


@pytest.mark.slow
def test_digits_gives_the_same_figures_however_it_is_launched(tmp_path):
    script = [ROOT / "examples" / "digits.py", "--epochs", "3", "--run-dir"]
    launchers = {"python": [sys.executable], "torchrun": TORCHRUN, "accelerate": ACCELERATE}
    for name, launcher in launchers.items():
        run([*launcher, *script, tmp_path / name])
    alone = evaluations(tmp_path / "python")
    assert [row["epoch"] for row in alone] == [0, 1, 2]
    for name in ("torchrun", "accelerate"):
        for mine, theirs in zip(alone, evaluations(tmp_path / name), strict=True):
            assert theirs["step"] == mine["step"]
            assert theirs["eval/loss"] == pytest.approx(mine["eval/loss"], abs=1e-4)
            assert theirs["eval/accuracy"] == pytest.approx(mine["eval/accuracy"], abs=1e-4)


@pytest.mark.slow
def test_the_gan_is_the_same_on_any_ranks_and_survives_kills(tmp_path):
    script = [ROOT / "examples" / "gan.py", "--epochs", "1", "--run-dir", tmp_path / "gan"]
    told = run([sys.executable, "-m", "dtrain", "check", *script])
    assert "EQUAL: " in told
    told = run([sys.executable, "-m", "dtrain", "drill", "--kills", "1", "--steps", "9", *script])
    assert "SURVIVES: " in told


@pytest.mark.slow
def test_ppo_learns_on_two_ranks_and_goes_on_where_it_was(tmp_path):
    script = [ROOT / "examples" / "ppo.py", "--run-dir", tmp_path / "ppo", "--iterations"]
    told = run([*TORCHRUN, *script, 9])
    stood = [float(found) for found in re.findall(r"stands for ([\d.]+) steps", told)]
    assert len(stood) == 9
    assert stood[0] < 30
    assert max(stood) > 90
    told = run([*TORCHRUN, *script, 10])
    assert re.findall(r"iteration (\d+):", told) == ["9"]
    told = run([sys.executable, "-m", "dtrain", "check", *script, 2])
    assert "EQUAL: " in told


@pytest.mark.slow
def test_a_student_is_the_same_on_any_ranks_and_survives_kills(tmp_path):
    """Of the teacher that a first start has left: what follows is of the script's other fit."""
    script = [ROOT / "examples" / "distill.py", "--epochs", "2", "--run-dir", tmp_path / "run"]
    assert run([sys.executable, *script]).count("finished after") == 2
    (tmp_path / "run" / "student").rename(tmp_path / "first")
    assert run([*TORCHRUN, *script]).count("finished after") == 1
    first, second = (evaluations(one) for one in (tmp_path / "first", tmp_path / "run" / "student"))
    losses = [[row["eval/loss"] for row in rows] for rows in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    told = run([sys.executable, "-m", "dtrain", "check", *script])
    assert "EQUAL: " in told
    told = run([sys.executable, "-m", "dtrain", "drill", "--kills", "1", "--steps", "9", *script])
    assert "SURVIVES: " in told


def test_digits_reaches_97_percent_on_two_ranks(tmp_path):
    run([*TORCHRUN, ROOT / "examples" / "digits.py", "--run-dir", tmp_path / "run"])
    best = max(row["eval/accuracy"] for row in evaluations(tmp_path / "run"))
    assert best >= 0.97
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"


def test_the_readmes_training_runs_as_it_is(tmp_path):
    blocks = re.findall(r"```python\n(import dtrain.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    (tmp_path / "train.py").write_text(blocks[0])
    told = run([*TORCHRUN, "train.py"], cwd=tmp_path)
    assert "finished after" in told
    saved = sorted((tmp_path / "runs" / "readme" / "checkpoints").iterdir())
    assert len(saved) == 2


def test_gpt_trains_evaluates_and_writes(tmp_path):
    options = [
        "--steps",
        "4",
        "--batch-size",
        "8",
        "--micro-batch-size",
        "2",
        "--precision",
        "fp32",
        "--run-dir",
    ]
    told = run([*TORCHRUN, ROOT / "examples" / "gpt.py", *options, tmp_path / "run"])
    assert "validation loss: " in told
    assert "the model writes" in told
    assert [row["step"] for row in evaluations(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/design.md",
        "docs/callbacks.md",
        "docs/check.md",
        "docs/drill.md",
        "docs/fits.md",
        "docs/scaling.md",
        "docs/testing.md",
        "docs/updates.md",
    ],
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert missing == []
