"""Real mpiruns: Open MPI's and MPICH's."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from launch.test_launchers import SCRIPT, environment, read_ranks, run

pytestmark = pytest.mark.slow

PACKAGES = {"mpirun.openmpi": "openmpi-bin", "mpiexec.hydra": "mpich"}
COMMANDS = {
    "Open MPI": ("mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "-n"),
    "MPICH": ("mpiexec.hydra", "-n"),
}

FAILING_SCRIPT = """
import sys

import torch
from torch.utils.data import TensorDataset

import dtrain


class Fails(dtrain.Callback):
    def on_step_end(self, ctx, step):
        fail("on_step_end", step.number)


def fail(where, step):
    if sys.argv[1] == where and world.rank == 1 and step == 2:
        raise ValueError(f"planted in {where}")


def loss_fn(model, batch, ctx):
    fail("loss_fn", ctx.progress.step)
    return model(batch[0]).mean()


world = dtrain.init()
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
trainer = dtrain.Trainer(model, optimizer, loss_fn, callbacks=[Fails()], sinks=[])
trainer.fit(TensorDataset(torch.ones(24, 3)), batch_size=6, epochs=2)
"""

LEAVING_SCRIPT = """
import sys

import torch
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import Checkpoint


class Started(dtrain.Callback):
    def on_step_end(self, ctx, step):
        if step.number == 3 and world.rank == 0:
            print("STARTED", flush=True)


world = dtrain.init()
model = torch.nn.Linear(3, 1)
trainer = dtrain.Trainer(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1),
    lambda model, batch: model(batch[0]).mean(),
    run_dir="left",
    callbacks=[Started(), Checkpoint(every_epochs=10**6)],
    sinks=[],
)
result = trainer.fit(TensorDataset(torch.ones(24, 3)), batch_size=6, epochs=10**6)
sys.exit(75 if result.preempted else 0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    missing = [package for name, package in PACKAGES.items() if shutil.which(name) is None]
    if missing:
        if not os.environ.get("CI") and (os.geteuid() != 0 or shutil.which("apt-get") is None):
            pytest.skip(f"{', '.join(missing)} must be installed")
        install = ["apt-get", "install", "-qq", "--no-install-recommends", *missing]
        for command in (["apt-get", "update", "-qq"], install):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=100)
    folder = tmp_path_factory.mktemp("mpi")
    for name, text in (("train", SCRIPT), ("fail", FAILING_SCRIPT), ("leave", LEAVING_SCRIPT)):
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def by_torchrun(folder):
    """What four ranks of torchrun make of the script."""
    (folder / "torchrun").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    done = run([*command, "train.py", "torchrun"], folder)
    assert done.returncode == 0, done.stderr
    return read_ranks(folder / "torchrun", 4, "torchrun")


@pytest.mark.parametrize("mpi", COMMANDS)
def test_four_ranks_train_to_torchruns_figures(folder, by_torchrun, mpi):
    out = folder / mpi.replace(" ", "-")
    out.mkdir()
    # A shell of its own for each rank: its parent is then not what they share.
    script = f"{sys.executable} train.py {out.name}; exit $?"
    done = run([*COMMANDS[mpi], "4", "bash", "-c", script], folder)
    assert done.returncode == 0, done.stderr
    told = read_ranks(out, 4, "mpi")
    assert [one | {"launcher": "torchrun"} for one in told] == by_torchrun


@pytest.mark.parametrize("mpi", COMMANDS)
def test_a_rank_that_fails_ends_the_job_in_words(folder, mpi):
    done = run([*COMMANDS[mpi], "2", sys.executable, "fail.py", "on_step_end"], folder)
    assert done.returncode == 1
    assert "ValueError: planted in on_step_end" in done.stderr
    # The other one may be ended by mpirun before it could say so itself.
    remote = r"RemoteError: rank 1 on \S+ failed in on_step_end at step 2: ValueError: planted"
    assert re.search(remote, done.stderr) or "[rank1]" in done.stderr


@pytest.mark.parametrize("mpi", COMMANDS)
def test_a_usr1_to_mpirun_reaches_the_ranks_which_save_and_leave(folder, mpi):
    shutil.rmtree(folder / "left", ignore_errors=True)
    process = subprocess.Popen(
        [*COMMANDS[mpi], "2", sys.executable, "leave.py"],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = threading.Timer(60, process.kill)
    end.start()
    try:
        heard = []
        while not heard or "STARTED" not in heard[-1]:
            heard.append(process.stdout.readline())
            assert heard[-1], heard
        process.send_signal(signal.SIGUSR1)
        heard.append(process.communicate(timeout=40)[0])
        assert process.returncode == 75, heard
    finally:
        end.cancel()
        process.kill()
        process.communicate()
    status = json.loads((folder / "left" / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("preempted", "SIGUSR1")
    saved = [path.name for path in (folder / "left" / "checkpoints").iterdir()]
    assert saved == [f"step-{status['step']:08d}"]
