"""One script under every launcher: the same ranks find each other, and train the same model."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 100.0

SCRIPT = """
import warnings
warnings.simplefilter("error")

import json, os, sys
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

import dtrain

world = dtrain.init(seed=3)
x = torch.randn(24, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
model = torch.nn.Linear(3, 1).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
trainer = dtrain.Trainer(
    model, optimizer, lambda model, x: (model(x[0]) - x[0].sum(1, True)).square().mean(), sinks=[]
)
result = trainer.fit(TensorDataset(x), batch_size=6, epochs=2)
told = {
    "rank": world.rank,
    "local_rank": world.local_rank,
    "size": world.size,
    "launcher": world.launcher,
    "backend": world.backend,
    "steps": result.steps,
    "loss": result.metrics["train/loss"],
    "weights": model.weight.flatten().tolist(),
}
Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the scripts; its name has a space in it, as names do."""
    folder = tmp_path_factory.mktemp("my runs")
    (folder / "train.py").write_text(SCRIPT)
    (folder / "init.py").write_text("import dtrain\nprint(dtrain.init())\n")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """What one process makes of the script."""
    return run_ranks([sys.executable, "train.py"], folder, 1, "solo")[0]


def environment(folder, **variables):
    """This process's environment without launchers' traces, GPUs and network."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "NODE_RANK")
    launchers += (
        "NNODES",
        "RDZV_",
        "TORCHELASTIC_",
        "TORCH_DIST",
        "SLURM_",
        "OMPI_",
        "PMI",
        "MPI_",
    )
    launchers += ("MV2_", "JSM_", "PALS_", "PET_", "JOB_", "RAY_", "KUBERNETES_", "PBS_", "LSB_")
    launchers += ("ACCELERATE_", "RESTARTS", "RANKS", "OMP_NUM_THREADS", "PYTHONWARNINGS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    kept |= {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return kept | variables


def run(command, folder, **variables):
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(folder, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def run_ranks(command, folder, size, launcher, **variables):
    """Runs the script on ``size`` ranks; returns what each told, by rank."""
    out = folder / f"out-{len(list(folder.glob('out-*')))}"
    out.mkdir()
    done = run([*command, out.name], folder, **variables)
    assert done.returncode == 0, done.stderr
    assert "destroy_process_group" not in done.stderr
    return read_ranks(out, size, launcher)


def read_ranks(out, size, launcher):
    assert sorted(path.name for path in out.iterdir()) == [f"{r}.json" for r in range(size)]
    told = [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]
    for rank, one in enumerate(told):
        assert (one["rank"], one["local_rank"], one["size"]) == (rank, rank, size)
        assert one["launcher"] == launcher
        assert one["backend"] == ("none" if size == 1 else "gloo")
        assert one["steps"] == 8
        assert one["weights"] == told[0]["weights"]
        assert one["loss"] == told[0]["loss"]
    return told


def assert_same(told, alone):
    """The same training as in one process, whose float64 it rounds otherwise."""
    for one in told:
        norm = math.hypot(*alone["weights"])
        assert math.dist(one["weights"], alone["weights"]) <= 1e-12 * norm
        assert abs(one["loss"] - alone["loss"]) <= 1e-12 * alone["loss"]


def test_torchrun(folder, alone):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert_same(run_ranks([*command, "train.py"], folder, 2, "torchrun"), alone)


def test_torchrun_script(folder, alone):
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "train.py"]
    assert_same(run_ranks(command, folder, 3, "torchrun", RANKS="3"), alone)


def test_accelerate_launch(folder, alone):
    # On CPUs of one machine, accelerate starts one process, however many it is asked for.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "train.py"]
    (told,) = run_ranks(command, folder, 1, "solo")
    assert told == alone


def test_srun(folder, alone):
    out = folder / "out-srun"
    out.mkdir()
    job = free_job_id()
    processes = [
        subprocess.Popen(
            [sys.executable, "train.py", out.name],
            cwd=folder,
            env=environment(
                folder,
                SLURM_JOB_ID=str(job),
                SLURM_JOB_NODELIST="localhost",
                SLURM_LOCALID=str(rank),
                SLURM_NODEID="0",
                SLURM_NTASKS="2",
                SLURM_PROCID=str(rank),
                SLURM_STEP_NODELIST="localhost",
                SLURM_STEP_NUM_TASKS="2",
                SLURM_STEP_TASKS_PER_NODE="2",
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert_same(read_ranks(out, 2, "slurm"), alone)


def free_job_id():
    """A job whose port, which follows from its number, is not taken."""
    for job in range(os.getpid(), os.getpid() + 1000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 20000 + job % 12000)) != 0:
                return job
    raise AssertionError("no free port in a thousand")


OWN_GROUP = """
import sys
import torch.distributed as dist
import dtrain

dist.init_process_group("gloo")
world = dtrain.init()
assert world.comm.gather_objects("ranks", world.rank) == [0, 1]
if sys.argv[1:] == ["closes"]:
    world.close()
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["closes", "leaves it open"])
def test_a_group_of_the_scripts_own_ends_in_order(folder, ends):
    (folder / "own_group.py").write_text(OWN_GROUP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run([*command, "own_group.py", ends], folder)
    assert done.returncode == 0, done.stderr
    assert "terminate called" not in done.stderr


def test_a_half_set_environment_is_told_at_once(folder):
    done = run([sys.executable, "init.py"], folder, RANK="0")  # others: tests/unit/test_world.py
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(
        "dtrain.errors.LaunchError: the environment has RANK=0 but not WORLD_SIZE, LOCAL_RANK, "
        "MASTER_ADDR, MASTER_PORT. Start with torchrun (`torchrun --nproc-per-node=2 train.py`), "
        "or unset them all"
    )


USAGE = {
    "no script": ((), {}, "which script? Usage: launch/torchrun.sh SCRIPT"),
    "a script that is not there": (("trian.py",), {}, "there is no script 'trian.py'"),
    "RANKS=0": (("train.py",), {"RANKS": "0"}, "RANKS is '0'; it must be a number from 1 up."),
    "RESTARTS=often": (
        ("train.py",),
        {"RESTARTS": "often"},
        "RESTARTS is 'often'; it must be a number from 0 up.",
    ),
    "NNODES=2 without a meeting place": (("train.py",), {"NNODES": "2"}, "set RDZV_ENDPOINT"),
}


@pytest.mark.parametrize("name", USAGE)
def test_torchrun_script_says_what_is_wrong(folder, name):
    arguments, variables, words = USAGE[name]
    done = run(["bash", str(ROOT / "launch" / "torchrun.sh"), *arguments], folder, **variables)
    assert done.returncode == 2
    assert done.stderr.startswith("torchrun.sh: ")
    assert words in done.stderr
