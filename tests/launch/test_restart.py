"""A job that loses a rank to SIGKILL starts again by itself, and ends where it would have ended."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 110.0
STEPS = 12
EVERY_STEPS = 4

SCRIPT = """
import os, signal, sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import Checkpoint

world = dtrain.init(seed=3)
out, doomed_hook, doomed_step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])


class Starts(dtrain.Callback):
    def on_fit_start(self, ctx):
        (out / f"start-{attempt}-{world.rank}").write_text(str(ctx.progress.step))


class Dies(dtrain.Callback):
    def die(self, hook, ctx):
        due = hook == doomed_hook and ctx.progress.step == doomed_step
        if due and attempt == 0 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, ctx, step):
        self.die("on_step_end", ctx)

    def on_save(self, ctx):
        self.die("on_save", ctx)


x = torch.randn(48, 6, generator=torch.Generator().manual_seed(5))
model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
trainer = dtrain.Trainer(
    model,
    torch.optim.AdamW(model.parameters(), lr=1e-2),
    lambda model, batch: (model(batch[0]) - batch[0].sum(1, True)).square().mean(),
    callbacks=[Starts(), Checkpoint(every_steps=EVERY_STEPS, background=False), Dies()],
    sinks=[],
    run_dir=out / "run",
)
result = trainer.fit(TensorDataset(x), batch_size=8, max_steps=STEPS)
assert result.steps == STEPS, result
save_file(model.state_dict(), out / f"model-{world.rank}.safetensors")
"""


def run(folder, hook, step):
    """Runs the job on two ranks, with one restart; returns the final models' files, by rank."""
    folder.mkdir()
    script = folder / "train.py"
    constants = f"EVERY_STEPS, STEPS = {EVERY_STEPS}, {STEPS}\n"
    script.write_text(constants + SCRIPT)
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "NODE_RANK")
    launchers += ("NNODES", "RDZV_", "TORCHELASTIC_", "TORCH_DIST", "SLURM_", "PYTHONWARNINGS")
    env = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    env |= {"RANKS": "2", "RESTARTS": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "torchrun.sh"), script.name, ".", hook, str(step)],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return [(folder / f"model-{rank}.safetensors").read_bytes() for rank in range(2)]


def starts(folder):
    """From attempt and rank to the step that the attempt began at."""
    return {path.name: path.read_text() for path in folder.glob("start-*")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restart") / "unbroken"
    models = run(folder, "never", 0)
    assert starts(folder) == {"start-0-0": "0", "start-0-1": "0"}
    assert models[0] == models[1]
    return models


@pytest.mark.parametrize(
    ("hook", "step", "resumed_at"),
    [
        # Before the first checkpoint; in the middle of an epoch, between two checkpoints.
        pytest.param("on_step_end", 2, 0, marks=pytest.mark.slow),
        pytest.param("on_step_end", 7, 4, marks=pytest.mark.slow),
        ("on_save", 8, 4),  # while the second is being made
    ],
)
def test_a_killed_rank_costs_no_bit(tmp_path, unbroken, hook, step, resumed_at):
    folder = tmp_path / "killed"
    models = run(folder, hook, step)
    first, again = {"start-0-0": "0", "start-0-1": "0"}, str(resumed_at)
    assert starts(folder) == {**first, "start-1-0": again, "start-1-1": again}
    assert models == unbroken
