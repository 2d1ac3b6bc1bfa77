"""`dtrain check` finds what was planted, says so, and lets a clean script pass."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dtrain
from dtrain.cli import app
from dtrain.errors import CheckError, ConfigError
from dtrain.trials.check import Check
from dtrain.trials.launcher import Launcher

ROOT = Path(__file__).parents[2]

SCRIPT = '''
import os
import sys

import torch
from torch import nn
from torch.nn import functional as F

import dtrain
from dtrain.callbacks import Checkpoint, EarlyStopping, GradientAccumulation, MixedPrecision

fault, run_dir = sys.argv[1:]
rank = int(os.environ.get("RANK", 0))
if fault == "raises" or (fault == "raises on rank 1" and rank == 1):
    raise ValueError("planted")


class Marked(torch.utils.data.Dataset):
    """40 samples of up to 6 places, each with a class; -100 pads."""

    def __init__(self):
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(40, 6, generator=generator)
        self.y = torch.randint(3, (40, 6), generator=generator)
        lengths = torch.randint(1, 7, (40, 1), generator=generator)
        self.y[torch.arange(6) >= lengths] = -100
        self.noise = torch.Generator().manual_seed(rank)
        if fault == "odd steps":
            self.x = self.x.to(torch.float32)  # which ranks send one another, given the same

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        if fault == "rank in data":
            x = x + torch.randn(6, generator=self.noise)
        if fault == "augmentation":
            x = x + torch.randn(6)
        return x, self.y[index]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if "batchnorm" in fault else nn.LayerNorm(8)
        self.drop = nn.Dropout(0.2 if fault == "dropout" else 0.0)
        self.scores = nn.Linear(8, 6)
        self.shift = nn.Parameter(torch.zeros(1))
        self.head = nn.Linear(8, 18)

    def forward(self, x):
        h = torch.tanh(self.norm(self.up(x)))
        if fault == "functional dropout":
            h = F.dropout(h, 0.2)
        # A softmax does not see what is added to all its scores: the shift's gradient is zero.
        weights = torch.softmax(self.scores(h) + self.shift, 1)
        return self.head(self.drop(h)).unflatten(1, (6, 3)) * weights[..., None]


class OtherOnEachRank(dtrain.Callback):
    def on_grads_ready(self, ctx, step):
        for p in ctx.model.parameters():
            p.grad += 0.1 * rank


noise = torch.Generator().manual_seed(rank)


def loss_fn(model, batch, ctx):
    x, y = batch
    if fault == "rank in loss":
        x = x + 0.1 * torch.randn(x.shape, generator=noise)
    # float() is for mixed precision, and must not bring float32's rounding back.
    logits = model(x).flatten(0, 1).float()
    total = F.cross_entropy(logits, y.flatten(), reduction="sum")
    count = (y != -100).sum()
    if fault == "rank in weight":
        count = count * (1 + rank)
        total = total * (1 + rank)
    if "ragged" in fault or (fault == "odd steps" and ctx.progress.step % 2):
        return total / count
    return dtrain.Loss.from_sum(total, count)


# What the script would do at the end of a real training must not happen in a check.
with dtrain.init(seed=0) as world:
    if fault == "rank in model":
        torch.manual_seed(rank)
    if fault == "ranks in model":
        torch.manual_seed(world.size)
    model = Model()
    lr = 1e-2 * (world.size if fault == "ranks in settings" else 1)
    trainer = dtrain.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-30),
        loss_fn,
        callbacks=[
            Checkpoint(every_steps=1),
            MixedPrecision("bf16"),
            GradientAccumulation(micro_batch_size=3),
            EarlyStopping("eval/loss"),
            *([OtherOnEachRank()] if fault == "rank in callback" else []),
        ],
        run_dir=run_dir,
    )
    if fault == "never fits":
        sys.exit()
    evals = dtrain.Data(Marked(), 10)
    if fault == "tries":
        dtrain.lr_range_test(trainer, Marked(), batch_size=10, steps=5)
        trainer.evaluate(evals)
    if fault == "stream":
        trainer.fit([(torch.ones(4, 6), torch.zeros(4, 6).long())], max_steps=9, eval_set=evals)
    batch_size = 10 * (world.size if fault == "ranks in batch" else 1)
    trainer.fit(Marked(), batch_size=batch_size, epochs=3, eval_set=evals)
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
    """One for all checks here: its start is most of a check's time."""
    with Launcher(most_ranks=2) as launcher:
        yield launcher


@pytest.fixture
def check(folder, launcher):
    def run(fault, *, allow=(), micro_batches=(1, 2)):
        args = [fault, folder / "run"]
        found = Check(launcher, folder / "train.py", args, 2, 4, 60, allow).run(micro_batches)
        assert not (folder / "run").exists()
        return found

    return run


def causes(found):
    assert not found.passed, str(found)
    return [cause.name for cause in found.causes]


def test_a_clean_script_passes_and_zero_gradients_are_named(check):
    found = check("none")
    assert found.passed, str(found)
    titles = [run.title for run in found.runs]
    assert titles == [
        "1 rank x 2 micro-batches",
        "2 ranks x 1 micro-batch",
        "2 ranks x 2 micro-batches",
    ]
    assert found.dtype == "float64"
    assert all(run.loss_gap < 1e-12 and run.worst_gap < 1e-10 for run in found.runs)
    assert (found.causes, found.steps) == ((), 4)
    assert found.zero_gradients == ("shift",)
    assert "Zero gradient" in str(found)


def test_a_ragged_mean_is_found_and_told_with_both_numbers(check):
    found = check("ragged")
    assert causes(found) == ["ragged mean"]
    examined = found.causes[0].evidence
    assert "10 samples of step" in examined
    assert "In train mode" in examined or "In eval mode" in examined
    whole, parts = (examined.split(word)[1].split()[0] for word in ("step ", ") is "))
    assert whole != parts
    assert "Loss.from_sum" in found.causes[0].remedy
    assert found.runs[0].first_step == 0


def test_a_mean_that_is_ragged_in_some_steps_is_found(check):
    """Of ranks that are given the same samples, in float32, none sees others."""
    found = check("odd steps", micro_batches=(1,))
    assert causes(found) == ["ragged mean"]
    assert found.runs[0].first_step == 1


def test_what_a_script_tries_first_is_not_what_is_checked(check):
    found = check("tries", micro_batches=(1,))
    assert found.passed, str(found)
    assert (found.dtype, found.steps) == ("float64", 4)


def test_batchnorm_is_found_and_can_be_allowed(check):
    found = check("batchnorm")
    assert causes(found) == ["batchnorm"]
    assert "without it, the numbers are equal" in found.causes[0].evidence
    allowed = check("batchnorm", allow=("batchnorm",), micro_batches=(1,))
    assert allowed.passed, str(allowed)
    assert "eval mode" in str(allowed)


def test_two_faults_at_once_are_both_found(check):
    found = check("batchnorm, ragged", micro_batches=(1,))
    assert causes(found) == ["ragged mean", "batchnorm"]
    assert "there is another cause" in found.causes[1].evidence


@pytest.mark.parametrize("fault", ["dropout", "functional dropout"])
def test_dropout_is_found_and_can_be_allowed(check, fault):
    assert causes(check(fault, micro_batches=(1,))) == ["dropout"]
    assert check(fault, allow=("dropout",)).passed


def test_random_augmentation_is_found_and_can_be_allowed(check):
    assert causes(check("augmentation", micro_batches=(1,))) == ["augmentation"]
    assert check("augmentation", allow=("augmentation",)).passed


@pytest.mark.parametrize(
    ("fault", "cause", "told"),
    [
        ("rank in loss", "a loss function that depends on the rank", "torch.randn"),
        ("rank in weight", "a loss function that depends on the rank", "a weight of"),
        ("rank in data", "data that depend on the rank", "rank 0 and rank 1"),
        ("rank in callback", "ranks that drift apart", "rank 1"),
        ("ranks in model", "other initial parameters", "up.weight"),
        ("ranks in settings", "other settings of the optimizer", "lr is 0.01 and 0.02"),
    ],
)
def test_what_depends_on_ranks_is_found(check, fault, cause, told):
    found = check(fault, micro_batches=(1,))
    assert causes(found) == [cause]
    assert told in str(found)


def test_what_the_trainer_mends_is_told_and_passes(check):
    found = check("rank in model", micro_batches=(1,))
    assert found.passed
    assert "another model on rank 1 than on rank 0" in str(found)
    found = check("ranks in batch", micro_batches=(1,))
    assert found.passed
    assert "batch_size 10 on one rank and 20 on 2" in found.notes[0]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raises", "ValueError: planted"),
        ("raises on rank 1", "(rank 1):"),
        ("never fits", "never called Trainer.fit"),
        ("stream", "a map-style dataset"),
    ],
)
def test_a_script_that_cannot_be_checked_says_why(check, fault, told):
    with pytest.raises(CheckError) as caught:
        check(fault, micro_batches=(1,))
    assert told in str(caught.value)


PADS = """
import sys

import torch
from torch import nn
from torch.nn import functional as F

import dtrain


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(1, 9, (1 + index % 5,), generator=generator), index % 2


def collate(samples):
    texts, labels = zip(*samples)
    return nn.utils.rnn.pad_sequence(texts, batch_first=True), torch.tensor(labels)


def loss_fn(model, batch):
    texts, labels = batch
    found, real = model[0](texts), (texts > 0)[..., None]
    pooled = (found * real).sum(1) / real.sum(1) if sys.argv[1] == "masked" else found.mean(1)
    return F.cross_entropy(model[1](pooled), labels)


dtrain.init(seed=0)
model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
trainer = dtrain.Trainer(model, optimizer, loss_fn)
trainer.fit(dtrain.Data(Texts(), 6, collate_fn=collate), epochs=1)
"""


def test_padding_that_counts_is_found(folder, launcher):
    (folder / "pads.py").write_text(PADS)

    def check(pooling):
        return Check(launcher, folder / "pads.py", [pooling], 2, 2, 60).run([1])

    found = check("mean")
    assert causes(found) == ["padding"]
    assert "in two parts (1 and 5)" in found.causes[0].evidence or "(3 and 3)" in str(found)
    assert check("masked").passed


def test_gpt_passes(launcher):
    args = ["--size", "tiny", "--batch-size", "6"]
    found = Check(launcher, ROOT / "examples" / "gpt.py", args, 2, 2, 60).run([1, 2])
    assert found.passed, str(found)
    assert found.dtype == "float64"


def test_from_the_command_line(folder):
    """Options after the script's name are the script's; status 0 is for equal numbers."""
    script = [folder / "options.py", "--ranks", "7", "--help"]
    script[0].write_text(
        "import sys\n"
        "assert sys.argv[1:] == ['--ranks', '7', '--help'], sys.argv\n"
        "import helper\n"  # beside the script, as `python script` would find it
        f"sys.argv[1:] = ['none', {str(folder / 'run')!r}]\n"
        "exec(open(helper.path).read())\n"
    )
    (folder / "helper.py").write_text(f"path = {str(folder / 'train.py')!r}\n")
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", "check", "--steps", "2", "--micro-batches", "1", *script],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RANK": "3", "WORLD_SIZE": "4"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("EQUAL: ")
    assert "2 ranks x 1 micro-batch" in done.stdout
    assert "(the truth) ..." in done.stderr


def test_status_1_is_for_numbers_that_part(folder):
    script = [str(folder / "train.py"), "ragged", str(folder / "run")]
    done = CliRunner().invoke(app, ["check", "--ranks", "1", "--steps", "1", *script])
    assert done.exit_code == 1, done.output
    assert "NOT EQUAL" in done.output
    assert "Cause: ragged mean" in done.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere.py"], "there is no script 'nowhere.py'"),
        (["--ranks", "0", __file__], "ranks=0"),
        (["--micro-batches", "two", __file__], "--micro-batches two"),
        (["--allow", "sloth", __file__], "choose from dropout, batchnorm"),
        (["--ranks", "1", "--micro-batches", "1", __file__], "nothing to compare"),
        (["--sloth", __file__], "No such option"),
    ],
)
def test_status_2_is_for_what_cannot_be_checked(arguments, told):
    done = CliRunner().invoke(app, ["check", *arguments])
    assert done.exit_code == 2
    assert told in done.output


@pytest.mark.slow
def test_a_script_that_hangs_is_stopped_and_says_where(folder, launcher):
    (folder / "hang.py").write_text("import threading\nthreading.Event().wait()\n")
    with pytest.raises(CheckError, match=r"longer than 8 seconds(.|\n)*hang.py., line 2"):
        Check(launcher, folder / "hang.py", [], 1, 4, timeout_s=8).run([2])


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_nothing_outlives_a_check_that_is_interrupted(tmp_path, sign, status):
    (tmp_path / "hang.py").write_text(
        "import threading\npipe = open('pipe', 'w')\nthreading.Event().wait()\n"
    )
    os.mkfifo(tmp_path / "pipe")
    running = subprocess.Popen(
        [sys.executable, "-m", "dtrain", "check", "hang.py"],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stderr=subprocess.DEVNULL,
        restore_signals=True,
    )
    with (tmp_path / "pipe").open() as pipe:  # once the script is there
        running.send_signal(sign)
        assert running.wait(60) == status
        pipe.read()  # until the script is gone
    folders = list(tmp_path.glob("dtrain-check-*"))
    assert sign == signal.SIGKILL or folders == []


def test_an_argument_that_is_off_is_refused(folder):
    with pytest.raises(ConfigError, match="timeout_s=0"):
        dtrain.check_equivalence(folder / "train.py", timeout_s=0)
