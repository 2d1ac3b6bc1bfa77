"""`dtrain ablate` says of planted tweaks what they are, and goes on where it was killed."""

import csv
import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ablating
import pytest

import dtrain
from dtrain.errors import CheckError, ConfigError

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("study_script.py")

pytestmark = pytest.mark.timeout(120)


def run(folder, *arguments, status=0):
    return ablating.run(folder, *arguments, SCRIPT, status=status)


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


@pytest.mark.slow
def test_asked_again_it_runs_only_what_is_missing(study, tmp_path):
    shutil.copytree(study[0], tmp_path / "again")
    folder = tmp_path / "again"
    done = run(folder, *WITHOUT, "--folder=study")
    assert "1 of" not in done.stderr
    assert done.stdout == study[1].stdout
    before = (folder / "study" / "study.json").read_text()
    done = run(folder, "--without=Useless", "--metric=eval/los", "--folder=study", status=2)
    assert "has no metric 'eval/los'. Did you mean eval/loss?" in done.stderr
    assert (folder / "study" / "study.json").read_text() == before
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
            starts = {
                json.loads((at / "study" / name / f"seed-{seed}" / "run.json").read_text())["start"]
                for at in (study[0], tmp_path)
            }
            assert len(starts) == 1


ODD = """
import sys
import torch
from torch import nn
import dtrain
from dtrain.callbacks import ClipGradients

modes = [one.removeprefix("--") for one in sys.argv[1:]]
dtrain.init(seed=0)
x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))


class Base(dtrain.Callback):
    pass


class Needs(dtrain.Callback):
    def on_step_start(self, ctx, step):
        if "raises" in modes:
            raise ValueError("planted\\nin two lines")


def loss_fn(model, batch):
    loss = (model(batch[0]) - batch[1]).square().mean()
    return loss * float("nan") if "diverges" in modes else loss


def make():
    model = nn.Linear(4, 1)
    return dtrain.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn,
        callbacks=[ClipGradients(1.0), Base(), Needs(), *([Extra()] if "more" in modes else [])],
    )


if "more" in modes:
    class Extra(Base):
        pass

if "broken" in modes:
    raise RuntimeError("it never trains")
trainer = make()
try:
    trainer.fit(data, batch_size=8, epochs=1, eval_set=data)
except ValueError:
    if "catches" not in modes:
        raise
    sys.exit()
if "fits" in modes:
    trainer.fit(data, batch_size=8, epochs=2, eval_set=data)
if "trainers" in modes:
    make().fit(data, batch_size=8, epochs=3, eval_set=data)
print(trainer.evaluate(data, batch_size=8))
if "exits" in modes:
    sys.exit("not good enough")
"""


def test_what_goes_wrong_is_a_row_or_words(tmp_path):
    script = tmp_path / "odd.py"
    script.write_text(ODD)
    modes = ("raises", "diverges", "broken", "fits", "trainers", "exits")
    named = {
        "caught": ["--raises", "--catches"],
        "without Extra": ["--more", "without Extra"],
        "without more": ["--fits", "without Extra"],
    }
    study = dtrain.ablate(
        script, arg=modes, variants=named, seeds=2, folder=tmp_path / "study", jobs=2
    )
    rows = {row["variant"]: row for row in study.table}
    assert [*rows] == ["base", *modes, *named]
    # With other arguments it has other callbacks.
    assert rows["without Extra"]["difference"] == 0
    assert rows["without more"]["error"].startswith("ConfigError: without Extra touches nothing")
    assert rows["caught"]["error"] == "its training failed, and the script went on without it"
    assert (rows["raises"]["failed"], rows["raises"]["error"]) == (2, "ValueError: planted")
    assert (rows["broken"]["failed"], rows["broken"]["error"]) == (
        2,
        "RuntimeError: it never trains",
    )
    assert (rows["diverges"]["diverged"], rows["diverges"]["mean"]) == (2, None)
    assert "diverged in 2 of 2 seeds, the base in none" in rows["diverges"]["sentence"]
    # What it did last is compared, and what else is to be known is said.
    assert rows["fits"]["mean"] < rows["base"]["mean"]
    assert rows["trainers"]["mean"] < rows["base"]["mean"]
    assert rows["exits"]["difference"] == 0
    notes = "\n".join(study.report.notes)
    assert "odd.py calls fit 2 times: what is compared is of the last (trainer-2)" in notes
    assert "exits, seed 0: after its training the script ended with exit status 'not good" in notes
    last = study.folder / "trainers" / "seed-1" / "trainer-2" / "metrics.jsonl"
    assert json.loads(last.read_text().splitlines()[-1])["step"] == 12

    with pytest.raises(ConfigError, match=r"no metric 'eval/los'.*eval/loss"):
        dtrain.ablate(script, arg=["fits"], metric="eval/los", mode="min", folder=tmp_path / "two")
    with pytest.raises(CheckError, match="it never trains"):
        dtrain.ablate(script, ["broken"], without=["Base"], folder=tmp_path / "three")
    with pytest.raises(ConfigError, match="cannot be written"):
        dtrain.ablate(script, without=["Base"], folder="/proc/study")
    script.write_text(ODD + "# changed")
    with pytest.raises(ConfigError, match=r"odd\.py has changed since the study"):
        dtrain.ablate(script, arg=modes, folder=tmp_path / "study")
