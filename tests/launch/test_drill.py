"""`dtrain drill` kills what was made to survive, and finds what was planted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dtrain.cli import app
from dtrain.errors import CheckError, ConfigError
from dtrain.trials.commands import drill_script
from dtrain.trials.drill import Drill
from dtrain.trials.launcher import Launcher

ROOT = Path(__file__).parents[2]

SCRIPT = '''
import os
import sys
import threading
import time

import torch
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import EMA, Checkpoint, LRSchedule

fault, run_dir = sys.argv[1:]
if fault == "raises":
    raise ValueError("planted")


class Counts(dtrain.Callback):
    """Makes the loss grow with each step that it has seen, and may forget how many."""

    def __init__(self):
        self.count = 0

    def on_loss(self, ctx, step):
        self.count += 1
        step.loss.mean = step.loss.mean * (1 + 0.01 * self.count)

    def state_dict(self):
        return {} if fault == "forgets" else {"count": self.count}

    def load_state_dict(self, state):
        if fault == "chokes":
            raise ValueError("planted in load_state_dict")
        if fault == "hangs":
            threading.Event().wait()
        self.count = state.get("count", 0)


class Clock(dtrain.Callback):
    """Reports what no two runs have in common."""

    def on_step_end(self, ctx, step):
        ctx.log("clock", time.monotonic())


class Stream:
    """Four batches an epoch, of a generator that nobody puts back."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self):
        for _ in range(4):
            yield [torch.randn(4, 6, generator=self.generator)]


with dtrain.init(seed=0) as world:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    if fault == "none":
        model.insert(1, nn.Dropout(0.2))
    if fault in ("plain", "ranks in loss"):
        model[1] = nn.LayerNorm(8)
    scale = world.size if fault == "ranks in loss" else 1
    if fault == "wanders":
        torch.manual_seed(time.time_ns() % 2**31)
        nn.init.normal_(model[0].weight)

    def loss_fn(model, batch):
        x = batch[0][:, :6]  # what comes after is padding
        return scale * (model(x) - x.sum(1, True)).square().mean()

    callbacks = [Counts(), EMA(0.9), Clock()]
    if fault != "no checkpoint":
        callbacks.append(Checkpoint(every_epochs=1))
    trainer = dtrain.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        loss_fn,
        callbacks=callbacks,
        run_dir=None if fault == "no run_dir" else run_dir,
    )
    if fault == "never fits":
        sys.exit()
    def padded(samples):  # by as much as there are samples in the batch
        return [torch.stack([nn.functional.pad(x, (0, len(samples))) for (x,) in samples])]

    data = TensorDataset(torch.randn(40, 6, generator=torch.Generator().manual_seed(5)))
    if fault == "stream":
        trainer.fit(Stream(), epochs=9)
    else:
        steps = 2 if fault == "short" else None
        resume = "never" if fault == "begins anew" else "auto"
        evals = TensorDataset(data.tensors[0][:10])
        train = dtrain.Data(data, 8, collate_fn=padded if fault == "plain" else None)
        trainer.fit(train, epochs=9, max_steps=steps, eval_set=evals, resume=resume)
sys.exit("the script must end with its first fit")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the script; its name has a space in it, as names do."""
    folder = tmp_path_factory.mktemp("my scripts")
    (folder / "train.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def launcher():
    """One for all drills here: its start is most of a short one."""
    with Launcher(most_ranks=2, command="drill") as launcher:
        yield launcher


@pytest.fixture
def drilled(folder, launcher):
    def run(fault, *, ranks=1, kills=1, seed=0, other_ranks=None):
        args = [fault, folder / "run"]
        one = Drill(launcher, folder / "train.py", args, ranks, 10, seed, timeout_s=60)
        found = one.run(kills=kills, other_ranks=other_ranks)
        assert not (folder / "run").exists()  # the script's own run_dir
        return found

    return run


def test_a_clean_script_survives_on_two_ranks(drilled):
    found = drilled("none", ranks=2, kills=2)
    assert found.passed, str(found)
    all_ranks, one_rank, saving, preempted = found.trials
    assert all_ranks.done.startswith("kill -9 of all ranks, ")
    assert one_rank.done.startswith("kill -9 of rank ")
    assert saving.done.startswith("kill -9 within a save, ")
    assert preempted.done.startswith("SIGTERM to rank ")
    for trial in (all_ranks, one_rank):
        # From the newest checkpoint, or from the one before if that was still being written.
        assert max(2, trial.at - 4) <= trial.went_on_from[0] <= trial.at
    assert saving.at - 2 <= saving.went_on_from[0] <= saving.at
    # Agreed in the next step, or at the end of the epoch, and saved.
    assert preempted.went_on_from in ((preempted.at,), (preempted.at + 1,))
    assert found.steps == 10
    assert found.notes == ("not compared, because it differs in any two runs: clock.",)
    assert str(found).startswith("SURVIVES: ")


def test_a_callback_that_forgets_is_found_with_the_first_figure(drilled):
    found = drilled("forgets")
    assert not found.passed
    killed = found.trials[0]
    first = killed.differences[0]
    # The first report after the kill is the first that can show it.
    assert (first.what, first.name, first.step) == (
        "metric",
        "train/loss",
        killed.went_on_from[0] + 1,
    )
    assert " after 1 restart; undisturbed it is " in first.words
    assert "(off by " in first.words
    tensors = {one.name for one in killed.differences if one.what == "model"}
    assert {"0.weight", "1.running_mean"} <= tensors
    assert any(one.name.startswith("optimizer/") for one in killed.differences)
    text = str(found)
    assert text.startswith("DOES NOT SURVIVE: ")
    assert f"train/loss differs at step {first.step}" in text
    assert "state_dict" in text


def test_a_stream_that_nobody_puts_back_is_found_with_the_first_step(drilled):
    found = drilled("stream")
    killed = found.trials[0]
    assert killed.at > 4, "the kill must fall after the first epoch"
    first = killed.differences[0]
    assert (first.what, first.step) == ("samples", killed.went_on_from[0] + 1)
    assert "number 1 of the global batch of 4, and 4 are not of this step" in first.words


@pytest.mark.slow
def test_a_script_that_cannot_start_again_never_ends(drilled):
    found = drilled("chokes")
    assert not found.passed
    assert "when started again on 1 rank" in found.trials[0].failure
    assert str(found).count("ValueError: planted in load_state_dict") == 1  # not for each trial
    failed = [trial for trial in found.trials if trial.failure]
    assert len(failed) > 1
    assert str(found).count("never ended") == len(failed)


@pytest.mark.slow
def test_a_script_that_hangs_when_started_again_says_where(folder, launcher):
    args = ["hangs", folder / "run"]
    found = Drill(launcher, folder / "train.py", args, 1, 4, timeout_s=6).run(kills=1)
    assert "longer than 6 seconds" in found.trials[0].failure
    assert "in load_state_dict" in found.trials[0].failure


def test_going_on_with_another_number_of_ranks(drilled):
    found = drilled("plain", other_ranks=2)
    assert found.passed, str(found)
    assert found.trials[-1].done.endswith("; then 2 ranks")
    assert "1e-06 of their norm" in found.notes[-1].replace("\n", " ")


@pytest.mark.slow
def test_parameters_that_depend_on_the_number_of_ranks_are_found(drilled):
    found = drilled("ranks in loss", other_ranks=2)
    assert [trial.passed for trial in found.trials] == [True, True, True, False]
    (apart,) = found.trials[-1].differences
    assert apart.what == "model"
    assert "of their norm, more than 1e-06" in apart.words


@pytest.mark.parametrize(
    ("fault", "told"),
    [("no checkpoint", "has no Checkpoint among"), ("begins anew", "passes resume='never'")],
)
def test_what_a_kill_costs_is_told(drilled, fault, told):
    found = drilled(fault)
    assert found.passed, str(found)
    assert told in found.notes[0]
    begins = fault == "begins anew"
    assert (found.trials[0].went_on_from == (0,)) == begins


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raises", "ValueError: planted"),
        ("no run_dir", "gives its Trainer no run_dir"),
        ("never fits", "never called Trainer.fit"),
        ("short", "trains for 2 steps only"),
        ("wanders", "does not repeat itself"),
    ],
)
def test_a_script_that_cannot_be_drilled_says_why(drilled, fault, told):
    with pytest.raises(CheckError) as caught:
        drilled(fault)
    assert told in str(caught.value)


def test_a_stream_has_no_other_ranks(drilled):
    with pytest.raises(CheckError, match="iterable of ready batches"):
        drilled("stream", other_ranks=2)


def test_status_1_is_for_what_does_not_survive(folder):
    script = [str(folder / "train.py"), "forgets", str(folder / "run")]
    options = ["--ranks", "1", "--kills", "1", "--steps", "4"]
    done = CliRunner().invoke(app, ["drill", *options, *script])
    assert done.exit_code == 1, done.output
    assert "DOES NOT SURVIVE" in done.output
    assert "First difference (kill -9" in done.output


def test_status_2_is_for_a_script_without_run_dir(folder):
    done = CliRunner().invoke(app, ["drill", str(folder / "train.py"), "no run_dir", "run"])
    assert done.exit_code == 2
    assert "gives its Trainer no run_dir" in done.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere.py"], "there is no script 'nowhere.py'"),
        (["--ranks", "0", __file__], "ranks=0"),
        (["--kills", "0", __file__], "kills=0"),
        (["--steps", "2", __file__], "steps=2"),
        (["--other-ranks", "2", __file__], "other_ranks=2 is the number"),
        (["--timeout", "0", __file__], "timeout_s=0"),
        (["--sloth", __file__], "No such option"),
    ],
)
def test_status_2_is_for_options_that_are_off(arguments, told):
    done = CliRunner().invoke(app, ["drill", *arguments])
    assert done.exit_code == 2
    assert told in done.output


def test_an_argument_that_is_off_is_refused(folder):
    with pytest.raises(ConfigError, match="ranks=2, kills=1, other_ranks=0"):
        drill_script(folder / "train.py", kills=1, other_ranks=0)


@pytest.mark.slow
def test_nothing_outlives_a_drill_that_is_interrupted(tmp_path):
    (tmp_path / "hang.py").write_text(
        "import threading\npipe = open('pipe', 'w')\nthreading.Event().wait()\n"
    )
    os.mkfifo(tmp_path / "pipe")
    running = subprocess.Popen(
        [sys.executable, "-m", "dtrain", "drill", "hang.py"],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stderr=subprocess.DEVNULL,
        restore_signals=True,
    )
    with (tmp_path / "pipe").open() as pipe:  # once the script is there
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
        pipe.read()  # until the script is gone
    assert list(tmp_path.glob("dtrain-drill-*")) == []


@pytest.mark.slow
def test_digits_survives_every_place_of_a_save(launcher, tmp_path):
    args = ["--run-dir", tmp_path / "run"]
    one = Drill(launcher, ROOT / "examples" / "digits.py", args, 2, 12, 1, timeout_s=100)
    found = one.run(kills=6)
    assert found.passed, str(found)
    assert len(found.trials) == 10
    assert not (tmp_path / "run").exists()
