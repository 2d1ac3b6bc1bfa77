"""A run that is started twice: one start writes to its folder, and the other says why it ends."""

import hashlib
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0

SCRIPT = """
import errno, sys, threading
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import Checkpoint
from dtrain.checkpoint import format as files, run_lock

out, name, holds_at, locks, background = sys.argv[1:]
out = Path(out)
run_lock.WAIT_S = 1.0
world = dtrain.init(seed=3)
real_commit = files.commit


def no_locks(handle, operation):
    raise OSError(errno.ENOLCK, "No locks available")


def hold(where):
    if holds_at == where and world.is_main and not (out / "held").exists():
        (out / "held").touch()
        while not (out / "go").exists():
            threading.Event().wait(0.02)


def commit(aside, final, step, *rest):
    if step == 8:
        hold("commit")
    real_commit(aside, final, step, *rest)


class Holds(dtrain.Callback):
    def on_step_end(self, ctx, step):
        if step.number == 6:
            hold("step")


if locks == "unseen":
    run_lock.fcntl.flock = no_locks
files.commit = commit
x = torch.randn(48, 6, generator=torch.Generator().manual_seed(5))
model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
trainer = dtrain.Trainer(
    model,
    torch.optim.AdamW(model.parameters(), lr=1e-2),
    lambda model, batch: (model(batch[0]) - batch[0].sum(1, True)).square().mean(),
    callbacks=[Holds(), Checkpoint(every_steps=4, background=background == "beside")],
    sinks=[],
    run_dir=out / "run",
    hang_after_s=None,
)
trainer.fit(TensorDataset(x), batch_size=8, max_steps=20)
save_file(model.state_dict(), out / f"{name}-{world.rank}.safetensors")
"""


class Start:
    """One start of the script, on two ranks."""

    def __init__(self, out, name, holds_at="never", locks="seen", background="waits"):
        self.out, self.name = out, name
        (out / "train.py").write_text(SCRIPT)
        launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "NODE_RANK")
        launchers += ("NNODES", "RDZV_", "TORCHELASTIC_", "TORCH_DIST", "SLURM_", "PYTHONWARNINGS")
        env = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "RANKS": "2", "RESTARTS": "0"}
        command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "train.py", "."]
        with (out / f"log-{name}").open("w") as log:
            self.process = subprocess.Popen(
                [*command, name, holds_at, locks, background],
                cwd=out,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def held(self):
        deadline = time.monotonic() + TIMEOUT_S
        while not (self.out / "held").exists():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline
            threading.Event().wait(0.02)

    def ends(self):
        code = self.process.wait(TIMEOUT_S)
        print(f"-- {self.name} ended with {code}:\n{self.said()}")
        return code

    def said(self):
        return (self.out / f"log-{self.name}").read_text()

    def models(self):
        return [(self.out / f"{self.name}-{rank}.safetensors").read_bytes() for rank in range(2)]


@pytest.fixture
def start(tmp_path):
    started = []

    def start(*args, **options):
        started.append(Start(tmp_path, *args, **options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGTERM)  # torchrun takes its ranks along
            (tmp_path / "go").touch()
            one.process.wait(TIMEOUT_S)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    one = Start(tmp_path_factory.mktemp("one"), "alone")
    assert one.ends() == 0
    return one.models()


def digests(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_second_start_by_mistake_is_refused_and_harms_nothing(tmp_path, start, unbroken):
    first = start("first", holds_at="step")
    first.held()
    second = start("second")
    assert second.ends() == 1
    assert "RunTaken: another start of this run (pid " in second.said()
    assert f"is alive and writes to {tmp_path / 'run'}" in second.said()
    (tmp_path / "go").touch()
    assert first.ends() == 0
    assert first.models() == unbroken


@pytest.mark.parametrize(
    ("holds_at", "background"), [("step", "waits"), ("step", "beside"), ("commit", "beside")]
)
def test_an_old_start_that_was_cut_off_harms_nothing(
    tmp_path, start, unbroken, holds_at, background
):
    """As if its host could not be reached, and the job was begun again on another."""
    old = start("old", holds_at, background=background)
    old.held()
    new = start("new", locks="unseen")
    assert new.ends() == 0
    assert new.models() == unbroken
    left = digests(tmp_path / "run")
    (tmp_path / "go").touch()
    assert old.ends() == 1
    assert digests(tmp_path / "run") == left
    assert "RunTaken: another start of this run (pid " in old.said()
    folder = tmp_path / "run"
    assert f"writes to {folder} now, so this one ends, and leaves it as it is" in old.said()
    if background == "beside":  # from a thread of its own, which is at no step
        assert re.search(r"failed in saving a checkpoint at step [1-9]", old.said())
