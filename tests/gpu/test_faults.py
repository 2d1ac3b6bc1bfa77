"""What fails on a card: a kernel, memory, too many ranks; and what a Trainer leaves there."""

import gc
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import training

import dtrain

LOST = """
import torch, dtrain
from dtrain.callbacks import Checkpoint
from torch.utils.data import TensorDataset

dtrain.init(seed=0)
rows = torch.arange(256) % 10
rows[200] = 10_000  # the table has 10
net = torch.nn.Sequential(torch.nn.Embedding(10, 16), torch.nn.Linear(16, 10)).cuda()
data = dtrain.Data(TensorDataset(rows, torch.zeros(256, dtype=torch.long)), 8, shuffle=False)
loss = lambda net, batch: torch.nn.functional.cross_entropy(net(batch[0]), batch[1])
optimizer = torch.optim.AdamW(net.parameters(), fused=True)
keep = [Checkpoint(every_steps=5)]
dtrain.Trainer(net, optimizer, loss, callbacks=keep, sinks=[], run_dir="run").fit(data, epochs=1)
"""


@pytest.fixture(autouse=True)
def card(device):
    if device.type != "cuda":
        pytest.skip("there is no card that could fail (tests/ranks/test_lost_device.py)")


def run(*command, folder, **env):
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(dtrain.__file__).parents[1])} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_kernel_that_fails_ends_the_process_with_1(tmp_path):
    done = run(sys.executable, "-c", LOST, folder=tmp_path)
    assert done.returncode == 1, done.stderr[-4000:]
    assert "device-side assert triggered" in done.stderr
    assert "CUDA_LAUNCH_BLOCKING=1 has the error raised where it is" in done.stderr
    assert "(the newest checkpoint is " in done.stderr
    assert not (tmp_path / "run" / "emergency").exists()


def test_more_ranks_than_cards_are_refused(tmp_path):
    (tmp_path / "train.py").write_text("import dtrain\ndtrain.init()\n")
    ranks = torch.cuda.device_count() + 1
    torchrun = (sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}")
    done = run(*torchrun, "train.py", folder=tmp_path)
    assert done.returncode != 0
    assert f"LaunchError: {ranks} ranks run on " in done.stderr
    assert f"torch.cuda.device_count()={ranks - 1}" in done.stderr


def test_memory_that_is_short_is_told_of():
    def loss(net, batch):
        torch.empty(2**50, device="cuda")

    trainer = dtrain.Trainer(training.model(), training.adamw, loss, sinks=[])
    with pytest.raises(torch.OutOfMemoryError) as raised:
        trainer.fit(training.dataset(64), batch_size=32, epochs=1)
    (note,) = [one for one in raised.value.__notes__ if one.startswith("(out of memory in loss_fn")]
    assert "float32 [32, 64]" in note
    assert "GiB allocated on cuda" in note


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_on_the_card(fails):
    def loss(net, batch):
        if fails:
            raise ValueError("planted")
        return training.loss_fn(net, batch)

    def life():
        trainer = dtrain.Trainer(training.model(), training.adamw, loss, sinks=[])
        with suppress(ValueError):
            trainer.fit(training.dataset(256), batch_size=32, epochs=1)

    life()  # what torch and its libraries keep for themselves
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        life()
    finally:
        gc.enable()
    assert torch.cuda.memory_allocated() <= before
