"""In a real job: steps side by side, mpirun, torchruns each for itself, one process alone."""

import os
import shutil
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

SCRIPT = """
import sys
import threading
from pathlib import Path

import dtrain


def meet(mine, other):  # both steps are there at once
    Path(f"{mine}-there").touch()
    for _ in range(600):
        if Path(f"{other}-there").exists():
            return
        threading.Event().wait(0.1)
    raise AssertionError(f"{other} never came")


with dtrain.init() as world:
    ranks = world.comm.gather_objects("ranks", world.rank)
    if len(sys.argv) > 2:
        world.comm.on_main("meet", lambda: meet(*sys.argv[1:]))
    told = f"{world.launcher} {world.rank} of {world.size}, {world.local_rank} here, {ranks}"
    Path(f"{sys.argv[1]}-{world.rank}").write_text(told)
"""

JOB = f"""#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=2 --output=log.txt
export MASTER_ADDR=localhost # where all nodes are one machine, their names mean nothing
python=$(realpath -s {sys.executable})
"$python" tell.py alone 2>alone.txt
srun --mpi=pmi2 --ntasks=2 "$python" tell.py pmi2
srun --ntasks=2 --nodes=1 --exact "$python" tell.py a b &
srun --ntasks=2 --nodes=1 --exact "$python" tell.py b a &
wait
mpirun.openmpi --allow-run-as-root -n 4 "$python" tell.py mpi
unset MASTER_ADDR
srun --ntasks=2 "$python" -m torch.distributed.run --standalone --nproc-per-node=1 \\
    tell.py two >two.txt 2>&1
echo "ended with $?" >>two.txt
"""


def test_each_finds_its_own(cluster, tmp_path):
    if not os.environ.get("CI") and shutil.which("mpirun.openmpi") is None:
        pytest.skip("Open MPI is not installed (openmpi-bin)")
    (tmp_path / "tell.py").write_text(SCRIPT)
    (tmp_path / "job.sbatch").write_text(JOB)
    job = cluster.submit(tmp_path, tmp_path / "job.sbatch")
    job.wait(150)
    log = (tmp_path / "log.txt").read_text()

    def told(name):
        return [path.read_text() for path in sorted(tmp_path.glob(f"{name}-[0-9]"))]

    assert told("alone") == ["solo 0 of 1, 0 here, [0]"], log
    assert (tmp_path / "alone.txt").read_text().splitlines() == [
        "dtrain: note: SLURM gave this job 4 tasks (SLURM_NTASKS=4), but one process trains: "
        "`srun python train.py` starts a rank for each"
    ]
    assert told("pmi2") == [f"slurm {r} of 2, 0 here, [0, 1]" for r in range(2)], log
    assert told("a") == told("b") == [f"slurm {r} of 2, {r} here, [0, 1]" for r in range(2)], log
    mpi = told("mpi")
    assert [one.split(", ")[0] for one in mpi] == [f"mpi {rank} of 4" for rank in range(4)], log
    assert all(one.endswith("[0, 1, 2, 3]") for one in mpi)
    assert told("two") == []
    two = (tmp_path / "two.txt").read_text()
    assert two.count("LaunchError: srun started 2 tasks (SLURM_STEP_NUM_TASKS=2)") >= 2, two
    assert two.endswith("ended with 1\n")
