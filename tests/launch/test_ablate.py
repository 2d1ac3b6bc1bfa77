"""`dtrain ablate` says of planted tweaks what they are, and goes on where it was killed."""

import csv
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("study_script.py")

pytestmark = pytest.mark.timeout(120)


def run(folder, *arguments, script=SCRIPT, status=0):
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", "ablate", *arguments, str(script)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def verdicts(folder):
    rows = json.loads((folder / "table.json").read_text())["rows"]
    return {row["variant"]: row["verdict"] for row in rows}


WITHOUT = ("--without=Needed", "--without=Harmful", "--without=Useless", "--seeds=3")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of three planted tweaks, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("study")
    return folder, run(folder, *WITHOUT, "--folder=study")


def test_planted_tweaks_are_said_to_be_what_they_are(study):
    folder, done = study
    assert verdicts(folder / "study") == {
        "base": "base",
        "without Needed": "worse",
        "without Harmful": "better",
        "without Useless": "no difference seen",
    }
    said = [line for line in done.stdout.splitlines() if line.startswith("without ")]
    assert any(" worse (" in line and line.endswith("it matters") for line in said)
    assert "12 of 12: without Useless, seed 2" in done.stderr


def test_its_folder_is_read_without_dtrain(study):
    folder = study[0] / "study"
    with (folder / "table.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["variant"] for row in rows][1:] == [
        "without Needed",
        "without Harmful",
        "without Useless",
    ]
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "| without Needed |" in (folder / "table.md").read_text()
    one = folder / "without-Needed" / "seed-1"
    assert json.loads((one / "status.json").read_text())["status"] == "finished"
    assert json.loads((one / "config.json").read_text())["ablation"] == {
        "variant": "without Needed",
        "changes": ["without Needed"],
        "seed": 1,
    }
    last = json.loads((one / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 40
    assert "dtrain ablate: without Needed" in (one / "rank-0.txt").read_text()


def test_the_same_seed_is_the_same_start(study):
    folder = study[0] / "study"
    starts = {
        (name, seed): json.loads((folder / name / f"seed-{seed}" / "run.json").read_text())["start"]
        for name in ("base", "without-Useless")
        for seed in range(3)
    }
    assert len({*starts.values()}) == 3
    assert all(starts["base", seed] == starts["without-Useless", seed] for seed in range(3))


def test_asked_again_it_runs_only_what_is_missing(study, tmp_path):
    shutil.copytree(study[0], tmp_path / "again")
    folder = tmp_path / "again"
    done = run(folder, *WITHOUT, "--folder=study")
    assert "1 of" not in done.stderr
    assert done.stdout == study[1].stdout
    done = run(folder, "--without=Useless", "--set=Harmful.size=0", "--seeds=4", "--folder=study")
    ran = [line for line in done.stderr.splitlines() if " of 6: " in line]
    # The base and its variant with the new seed; the new variant with all four.
    assert len(ran) == 6, done.stderr
    assert "without Needed and base do not have all seeds in common" in done.stdout


@pytest.mark.slow
def test_killed_five_times_it_ends_as_if_left_alone(study, tmp_path):
    """At moments drawn from a seed: no run is done twice, and every figure has the same bits."""
    drawing = random.Random(7)
    # Steps in all: 12 runs of 40. Each kill comes so many after the one before.
    fuses = [drawing.randint(20, 110) for _ in range(5)]
    for fuse in fuses:
        (tmp_path / "fuse").write_text(str(fuse))
        command = [sys.executable, "-m", "dtrain", "ablate", *WITHOUT, "--folder=study", SCRIPT]
        at_work = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        (tmp_path / "pid").write_text(str(at_work.pid))
        assert at_work.wait(60) == -signal.SIGKILL
    done = run(tmp_path, *WITHOUT, "--folder=study")
    assert "12 of 12" not in done.stderr  # some were done before
    ends = (tmp_path / "ends").read_text().splitlines()
    assert len(ends) == len({*ends}) == 12
    for name in ("base", "without-Needed", "without-Harmful", "without-Useless"):
        for seed in range(3):
            there, here = (
                [
                    {k: v for k, v in json.loads(line).items() if k != "seconds"}
                    for line in (at / "study" / name / f"seed-{seed}" / "metrics.jsonl")
                    .read_text()
                    .splitlines()
                ]
                for at in (study[0], tmp_path)
            )
            assert there == here, (name, seed)
