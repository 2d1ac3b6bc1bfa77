"""After torchrun's own summary, one sentence says what became of the run."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from dtrain.cluster.torchrun import last_words

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os, signal, sys, threading
import torch
from torch.utils.data import TensorDataset
import dtrain
from dtrain.callbacks import Checkpoint

how, run_dir = sys.argv[1:]
world = dtrain.init(seed=0)


class Ends(dtrain.Callback):
    def on_step_end(self, ctx, step):
        if step.number == 5:
            if how == "raises" and world.rank == 1:
                raise ValueError("planted")
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "told to leave" and world.rank == 0:
                os.kill(os.getppid(), signal.SIGTERM)
        if how == "told to leave" and step.number > 5:
            threading.Event().wait(0.1)


model = torch.nn.Linear(3, 1)
trainer = dtrain.Trainer(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1),
    lambda model, batch: model(batch[0]).mean(),
    callbacks=[Ends(), Checkpoint(every_steps=2)],
    run_dir=run_dir,
)
trainer.fit(TensorDataset(torch.ones(64, 3)), batch_size=8, max_steps=200)
sys.exit(3 if how == "fails after" else 0)
"""


def launch(tmp_path, how, **env):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "torchrun.sh"), str(script), how, str(tmp_path / "run")],
        env=os.environ | {"RANKS": "2", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path)} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert not list(tmp_path.glob("dtrain-*"))  # nothing is left
    return done, done.stderr.splitlines()


ENDS = [
    ("raises", 1, "failed at step 6 (rank 1 on "),
    ("told to leave", 1, "left after "),
    (
        "fails after",
        1,
        "finished after 200 steps (max_steps reached); what failed came after that.",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code", "words"), ENDS)
def test_the_last_line(tmp_path, how, code, words):
    done, lines = launch(tmp_path, how)
    assert done.returncode == code
    assert lines[-1].startswith(f"dtrain: {words}")
    if how == "raises":
        assert "at step 5: ValueError: planted (" in lines[-1]
        assert lines[-1].endswith("), saved at step 4: the same command goes on from there.")
        assert "Root Cause" in "\n".join(lines[:-1])  # torchrun's, before it


@pytest.mark.slow
def test_nothing_is_said_where_all_went_well_or_somebody_else_does(tmp_path):
    _, lines = launch(tmp_path, "ends")
    assert not [line for line in lines if line.startswith("dtrain: ")]
    own = tmp_path / "own.json"
    (tmp_path / "2").mkdir()
    done, lines = launch(tmp_path / "2", "killed")
    assert done.returncode == 1
    assert lines[-1].startswith("dtrain: killed at step ")
    (tmp_path / "3").mkdir()
    _, lines = launch(tmp_path / "3", "killed", DTRAIN_STATUS_FILE=str(own))
    assert not lines[-1].startswith("dtrain: killed")
    assert json.loads(own.read_text())["sentence"].startswith("killed at step ")


FACTS = {"status": "failed", "sentence": "failed at step 4", "requeue": True}


@pytest.mark.parametrize(
    ("facts", "failed", "words"),
    [
        (None, True, ""),
        (FACTS, True, "failed at step 4: the same command goes on from there"),
        (
            FACTS | {"requeue": False},
            True,
            "failed at step 4: another start by itself would fail there, too. Mend it, then start "
            "again",
        ),
        ({"status": "finished", "sentence": "finished", "requeue": False}, False, ""),
        (
            {"status": "finished", "sentence": "finished", "requeue": False},
            True,
            "finished; what failed came after that",
        ),
    ],
)
def test_words(tmp_path, facts, failed, words):
    file = tmp_path / "status.json"
    if facts is not None:
        file.write_text(json.dumps(facts))
    assert last_words(file, failed=failed) == words


def test_a_file_of_something_else_is_no_word(tmp_path):
    (tmp_path / "status.json").write_text("[")
    assert last_words(tmp_path / "status.json", failed=True) == ""
