"""Under torchrun, an error on one rank ends the job in seconds, and is its root cause."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

import dtrain

ROOT = Path(__file__).parents[2]
SECONDS = 15.0  # at most, from the raise to the end of all processes; some 3 on a quiet machine

SCRIPT = """
import sys, time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

import dtrain
from dtrain.callbacks import Checkpoint

where, failing = sys.argv[1], int(sys.argv[2])
hook = where.removesuffix(LATER := " of a later update")
world = dtrain.init(seed=0)


def fail():
    Path("raised").write_text(str(time.time()))
    raise ValueError(f"planted in {where}")  # here


class Rows(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, row):
        if where in ("dataset", "worker") and world.rank == failing and row >= 40:
            fail()
        return torch.ones(4) * row


class Fails(dtrain.Callback):
    def on_epoch_end(self, ctx):
        if where == "on_main":
            ctx.comm.on_main("look", fail)


def plant(hook):
    def raises(self, ctx, *step):
        # In a step's hook, in the sixth step; in any other, at once.
        is_now = hook not in IN_A_STEP or step[0].number == 5
        if world.rank == failing and is_now and step[0:1] and where.endswith(LATER):
            is_now = step[0].update == "bias"
        if world.rank == failing and is_now:
            fail()

    return raises


IN_A_STEP = ["on_step_start", "on_batch", "on_loss", "on_grads_ready", "on_step_end"]
if where.startswith("on_") and where != "on_main":
    setattr(Fails, hook, plant(hook))


class FailingSink(dtrain.Sink):
    on_error = "raise"

    def write(self, report):
        fail()


def loss_fn(model, batch, ctx):
    if hook == "loss_fn" and world.rank == failing and ctx.progress.step == 5:
        fail()
    return model(batch).square().mean() * 1e-3


def losses(model, batch, ctx):
    yield "weight", model(batch).square().mean() * 1e-3
    yield "bias", loss_fn(model, batch, ctx)


def sgd(*params):
    return torch.optim.SGD(params, lr=1e-6)


model = nn.Linear(4, 1)
several = {"weight": sgd(model.weight), "bias": sgd(model.bias)}
trainer = dtrain.Trainer(
    model,
    several if where.endswith(LATER) else sgd(*model.parameters()),
    losses if where.endswith(LATER) else loss_fn,
    eval_fn=loss_fn,
    callbacks=[Fails(), Checkpoint()],
    sinks=[FailingSink()] if where == "sink" else [],
    run_dir="run",
)
data = dtrain.Data(Rows(), 8, num_workers=1 if where == "worker" else 0, shuffle=False)
trainer.fit(data, epochs=3, log_every=2, eval_set=dtrain.Data(Rows(), 8, shuffle=False))
"""
LINE = next(i for i, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# here"))


def processes_of(folder):
    """Processes that work in a folder: ranks, loader workers, whatever they have started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").resolve() == folder.resolve():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended meanwhile
            continue
    return found


def left_in_memory(before):
    """Shared memory that is new, and that nobody uses.

    Other tests may run at the same time, and be killed: launch/test.sh gives each call its own.
    """
    new, used = {*os.listdir("/dev/shm")} - before, set()
    for process in Path("/proc").glob("[0-9]*") if new else ():
        try:
            used |= {line.split()[-1] for line in (process / "maps").read_text().splitlines()}
            used |= {os.readlink(one) for one in (process / "fd").iterdir()}
        except OSError:  # it has ended meanwhile
            continue
    return {n for n in new if Path("/dev/shm", n).is_file() and f"/dev/shm/{n}" not in used}


HOOKS = sorted(name for name in vars(dtrain.Callback) if name.startswith("on_"))
PLACES = ["loss_fn", "dataset", "worker", *(hook for hook in HOOKS if hook != "on_error")]
QUICK = [("loss_fn", 1), ("worker", 1), ("on_main", 0), ("sink", 0)]
LATER = [(f"{where} of a later update", 1) for where in ("loss_fn", "on_grads_ready")]
REST = [(where, rank) for where in PLACES for rank in (0, 1) if (where, rank) not in QUICK]
REST += LATER


@pytest.mark.parametrize(
    ("where", "rank"), [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in REST)]
)
def test_an_error_is_the_jobs_root_cause_in_seconds(tmp_path, where, rank):
    (tmp_path / "train.py").write_text(SCRIPT)
    shared_before = set(os.listdir("/dev/shm"))
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "torchrun.sh"), "train.py", where, str(rank)],
        cwd=tmp_path,
        env=os.environ | {"RANKS": "2", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    raised = float((tmp_path / "raised").read_text())
    while (seconds := time.time() - raised) < SECONDS and processes_of(tmp_path):
        pass
    assert processes_of(tmp_path) == []
    assert done.returncode != 0
    root_cause = done.stderr[done.stderr.index("Root Cause") :]
    assert f"planted in {where}" in root_cause, done.stderr
    assert re.search(rf"train\.py\W+(line )?{LINE}\b", root_cause), root_cause
    assert f"rank      : {rank} " in root_cause or f"rank {rank} on " in root_cause, root_cause
    assert seconds <= SECONDS
    assert left_in_memory(shared_before) == set()
