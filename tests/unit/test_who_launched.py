"""Each launcher is known by its own variables; what is half set or contradicts itself is refused.

The environments are those that real launchers gave (Open MPI 4.1 and 5.0, MPICH 4.0, Intel MPI
2021.19, SLURM 22.05, Ray), or, of those that were not at hand, what their sources set.
"""

import socket
import zlib

import pytest

from dtrain.distributed import launchers
from dtrain.distributed.launchers import find_launcher, hint
from dtrain.errors import LaunchError


def open_mpi(rank=1, local=1, size=4, here=4, **more):
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(here),
        "PMIX_NAMESPACE": "prterun-vm-28131@1",
        **more,
    }


def hydra(rank=1, local=1, size=4, here=4, **more):
    env = {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALRANKID": local, "MPI_LOCALNRANKS": here}
    return {name: str(value) for name, value in env.items()} | more


def srun(task=1, tasks=2, step=0, **more):
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(task),
        "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": str(task),
        "SLURM_STEP_ID": str(step),
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        **more,
    }


SBATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "vm",
    "MASTER_PORT": "41234",
    "TORCHELASTIC_RUN_ID": "none",
}


def place(found):
    launcher, variables = found
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return launcher, *(variables.get(name) for name in names)


def refused(env):
    with pytest.raises(LaunchError) as raised:
        find_launcher(env)
    return str(raised.value)


# ----------------------------------------------------------------------------- MPI


@pytest.mark.parametrize(
    "env",
    [
        open_mpi(),
        hydra(),
        hydra(I_MPI_HYDRA_UUID="5a680000-a4b9"),
        {
            "MV2_COMM_WORLD_RANK": "1",
            "MV2_COMM_WORLD_SIZE": "4",
            "MV2_COMM_WORLD_LOCAL_RANK": "1",
            "MV2_COMM_WORLD_LOCAL_SIZE": "4",
        },
        {"PMI_RANK": "1", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"},
    ],
    ids=["Open MPI", "MPICH", "Intel", "MVAPICH", "PALS"],
)
def test_an_mpi_on_one_host(env):
    assert place(find_launcher(env)) == ("mpi", "1", "4", "1", "4", "localhost")
    port = int(find_launcher(env)[1]["MASTER_PORT"])
    assert 20000 <= port < 32000
    chosen = find_launcher(env | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4"})[1]
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("10.0.0.1", "4")


def test_two_mpiruns_on_a_host_do_not_meet():
    ports = {
        find_launcher(open_mpi(rank, rank, PMIX_NAMESPACE=start))[1]["MASTER_PORT"]
        for start in ("prterun-vm-1@1", "prterun-vm-2@1")
        for rank in range(4)
    }
    assert ports == {
        str(20000 + zlib.crc32(start) % 12000) for start in (b"prterun-vm-1@1", b"prterun-vm-2@1")
    }


def test_jsrun_is_lsfs_and_its_first_host_is_no_batch_node(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "127.0.0.1")
    env = open_mpi(0, 0, 12, 6, LSB_MCPU_HOSTS="batch5 1 h41n01 42 h41n02 42", LSB_JOBID="9")
    env |= {name.replace("OMPI_COMM_WORLD", "JSM_NAMESPACE"): v for name, v in env.items()}
    assert place(find_launcher(env)) == ("lsf", "0", "12", "0", "6", "h41n01")


def test_an_mpi_on_several_hosts_meets_at_the_jobs_first(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "127.0.0.1")
    nodes = tmp_path / "nodes"
    nodes.write_text("alpha\nalpha\nbeta\nbeta\n")
    pbs = {"PBS_NODEFILE": str(nodes), "PBS_JOBID": "77.server"}
    for rank, env in enumerate((hydra(0, 0, 4, 2, **pbs), hydra(1, 0, 4, 2, **pbs))):
        launcher, variables = find_launcher(env)
        assert (launcher, variables["RANK"]) == ("mpi", str(rank))
        assert variables["MASTER_ADDR"] == "alpha"
        assert variables["MASTER_PORT"] == str(20000 + zlib.crc32(b"77.server") % 12000)
    lsf = open_mpi(2, 0, 4, 2, LSB_HOSTS="beta beta gamma gamma")
    assert find_launcher(lsf)[1]["MASTER_ADDR"] == "beta"
    intel = hydra(2, 0, 4, 2, HYDRA_BSTRAP_LOCALHOST="delta")
    assert find_launcher(intel)[1]["MASTER_ADDR"] == "delta"


def test_rank_0_notices_that_the_jobs_first_host_is_not_its_own(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "192.0.2.77")
    words = refused(open_mpi(0, 0, 4, 2, LSB_HOSTS="beta beta gamma gamma"))
    assert f"the job's first host is beta, but rank 0 is on {socket.gethostname()}" in words
    assert "`mpirun -x MASTER_ADDR=$(hostname) ...`" in words


@pytest.mark.parametrize("env", [open_mpi(2, 0, 4, 2), hydra(2, 0, 4, 2)], ids=["OMPI", "hydra"])
def test_an_mpi_on_several_hosts_needs_the_first_ones_name(env):
    words = refused(env)
    assert "started 4 ranks on several hosts" in words
    assert "nothing says on which rank 0 is: set MASTER_ADDR to its name" in words
    assert "mpiexec -genv MASTER_ADDR $(hostname)" in words
    assert find_launcher(env | {"MASTER_ADDR": "alpha"})[1]["MASTER_ADDR"] == "alpha"


def test_mpirun_in_a_slurm_job_is_not_sruns_tasks():
    """Its daemons are: two tasks, four ranks."""
    for rank in range(4):
        for env in (open_mpi, hydra):
            found = find_launcher(env(rank, rank % 2, 4, 2, **srun(rank // 2), MASTER_ADDR="n1"))
            assert place(found) == ("mpi", str(rank), "4", str(rank % 2), "2", "n1")
    # On the first node mpirun itself is the parent, and SLURM's list of the step is missing.
    first = open_mpi(1, 1, 4, 2, **SBATCH)
    rest = open_mpi(2, 0, 4, 2, **srun(0, 1, SLURM_STEP_NODELIST="n2", SLURM_JOB_NODELIST="n[1-2]"))
    assert place(find_launcher(first))[5] == place(find_launcher(rest))[5] == "n1"


def test_srun_with_pmi_is_slurms_on_all_tasks():
    for task in range(2):
        for pmi in ({"PMI_RANK": str(task), "PMI_SIZE": "2", "PMI_JOBID": "7.0"}, {}):
            pmix = {"PMIX_RANK": str(task), "PMIX_NAMESPACE": "slurm.pmix.7.0"}
            found = find_launcher(srun(task) | pmi | pmix)
            assert place(found) == ("slurm", str(task), "2", "0", "1", "n1")


def test_half_of_mpiruns_variables_are_refused():
    env = open_mpi()
    del env["OMPI_COMM_WORLD_RANK"]
    words = refused(env)
    assert "mpirun started 4 ranks (OMPI_COMM_WORLD_SIZE=4)" in words
    assert "no OMPI_COMM_WORLD_RANK. Start with mpirun, or unset OMPI_COMM_WORLD_SIZE" in words
    assert "OMPI_COMM_WORLD_SIZE='x' is no number" in refused({"OMPI_COMM_WORLD_SIZE": "x"})


# ----------------------------------------------------------------------------- leftovers


@pytest.mark.parametrize(
    "env",
    [
        open_mpi(0, 0, 1, 1),
        hydra(0, 0, 1, 1),
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        {"MASTER_ADDR": "n1"},
        {"WORLD_SIZE": "1", "MASTER_ADDR": "n1"},
        srun(0, 1),
        SBATCH,
        SBATCH | {"PMIX_NAMESPACE": "slurm.pmix.7.0"},
        {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "1", "JOB_COMPLETION_INDEX": "0"},
        {"JOB_COMPLETION_INDEX": "3"},
    ],
    ids=str,
)
def test_leftovers_are_no_launch(env):
    assert find_launcher(env) == ("solo", {})


@pytest.mark.parametrize("outer", [open_mpi(0, 0, 4, 4), hydra(0, 0, 4, 4), srun(0, 2)], ids=str)
def test_torchrun_started_by_another_launcher_is_torchrun(outer):
    assert find_launcher(outer | TORCHRUN | {"GROUP_WORLD_SIZE": "2"}) == ("torchrun", {})


def test_srun_within_a_world_of_one_of_mpirun():
    assert find_launcher(open_mpi(0, 0, 1, 1) | srun(1))[0] == "slurm"


# ----------------------------------------------------------------------------- SLURM


def test_steps_of_a_job_do_not_meet():
    ports = [find_launcher(srun(step=step))[1]["MASTER_PORT"] for step in range(12)]
    assert len(set(ports)) == 12
    neighbours = srun(step=0) | {"SLURM_JOB_ID": "8"}
    assert find_launcher(neighbours)[1]["MASTER_PORT"] not in ports


def test_a_standalone_torchrun_on_each_of_sruns_tasks_is_refused():
    words = refused(srun(0, 2) | TORCHRUN)
    assert "srun started 2 tasks (SLURM_STEP_NUM_TASKS=2)" in words
    assert "GROUP_WORLD_SIZE=1" in words
    assert "slurm/many_nodes.sbatch" in words
    assert "unset SLURM_STEP_NUM_TASKS" in words
    assert find_launcher(srun(0, 1) | TORCHRUN) == ("torchrun", {})


def test_what_a_batch_script_exports_may_agree_with_srun():
    env = srun(1, 2, WORLD_SIZE="2", MASTER_ADDR="n1", MASTER_PORT="29500")
    assert place(find_launcher(env)) == ("slurm", "1", "2", "0", "1", "n1")
    words = refused(env | {"WORLD_SIZE": "1"})
    assert "WORLD_SIZE=1, but by what slurm has set it is 2: unset WORLD_SIZE" in words
    assert "RANK=0, but by what slurm has set it is 1" in refused(srun(1, 2, RANK="0"))


# ----------------------------------------------------------------------------- Kubernetes, Ray

POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
PYTORCHJOB = POD | {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "train-master-0",
    "MASTER_PORT": "23456",
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "auto",
    "PET_MASTER_ADDR": "train-master-0",
    "PET_MASTER_PORT": "23456",
}


def test_a_pytorchjob_runs_one_process_a_pod():
    known = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert find_launcher(PYTORCHJOB) == ("kubernetes", known)
    older = {name: value for name, value in PYTORCHJOB.items() if not name.startswith("PET_")}
    assert find_launcher(older) == ("kubernetes", {})  # ranks find out
    assert find_launcher(PYTORCHJOB | TORCHRUN) == ("torchrun", {})


def test_a_pytorchjob_of_several_processes_a_pod_wants_torchrun():
    words = refused(PYTORCHJOB | {"WORLD_SIZE": "16", "PET_NPROC_PER_NODE": "8"})
    assert "16 ranks are to run in 2 pods" in words
    assert "`torchrun train.py`" in words


@pytest.mark.parametrize(
    ("nodes", "processes"), [("2", "auto"), ("1", "8"), ("1:3", "1"), ("10", "1"), ("2", "")]
)
def test_a_trainjob_without_torchrun_is_refused(nodes, processes):
    env = {"PET_NNODES": nodes, "PET_NPROC_PER_NODE": processes, "PET_NODE_RANK": "0"}
    words = refused(POD | env)
    assert f"PET_NNODES={nodes}" in words
    assert "`torchrun train.py` reads them" in words


def test_a_pod_of_an_indexed_job():
    env = POD | {"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "train-0.train"}
    variables = {"RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29500"}
    assert find_launcher(env) == ("kubernetes", variables)
    assert find_launcher(env | {"MASTER_PORT": "3389"})[1]["MASTER_PORT"] == "3389"
    assert "MASTER_ADDR, the name of the pod with index 0" in refused(env | {"MASTER_ADDR": ""})
    assert "JOB_COMPLETION_INDEX=2, WORLD_SIZE=2" in refused(env | {"JOB_COMPLETION_INDEX": "2"})


def test_ray_says_all_that_torchrun_does():
    assert find_launcher(TORCHRUN | {"RAY_RAYLET_PID": "9"}) == ("torchrun", {})
    ray = {name: value for name, value in TORCHRUN.items() if name != "TORCHELASTIC_RUN_ID"}
    assert find_launcher(ray | {"RAY_RAYLET_PID": "9"}) == ("ray", {})


# ----------------------------------------------------------------------------- hints


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (SBATCH, "SLURM gave this job 4 tasks (SLURM_NTASKS=4), but one process trains: `srun"),
        (srun(0, 1), ""),
        (SBATCH | {"SLURM_NTASKS": "1"}, ""),
        ({"SLURM_NTASKS": "4"}, ""),
        ({"LSB_MCPU_HOSTS": "a 4 b 4", "LSB_JOBID": "1"}, "this job has 2 hosts (a, b), but one"),
        ({"LSB_MCPU_HOSTS": "a 8", "LSB_JOBID": "1"}, ""),  # eight cores for one process
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"}, "PET_NPROC_PER_NODE=auto is meant"),
        ({"JOB_COMPLETION_INDEX": "0", "PET_NNODES": "1", "PET_NPROC_PER_NODE": "1"}, ""),
        ({"JOB_COMPLETION_INDEX": "3"}, "JOB_COMPLETION_INDEX=3, but nothing says how many pods"),
        ({}, ""),
    ],
)
def test_one_process_is_told_what_it_leaves_unused(env, words):
    assert hint(env).startswith(words)
    assert bool(hint(env)) == bool(words)


def test_hosts_of_pbs_are_counted_once(tmp_path):
    nodes = tmp_path / "nodes"
    nodes.write_text("alpha\nalpha\nbeta\n")
    assert "this job has 2 hosts (alpha, beta)" in hint({"PBS_NODEFILE": str(nodes)})
    assert "launch/hosts.sh" in hint({"PBS_NODEFILE": str(nodes)})
    nodes.write_text("alpha\nalpha\n")
    assert hint({"PBS_NODEFILE": str(nodes)}) == ""
    assert hint({"PBS_NODEFILE": str(tmp_path / "elsewhere")}) == ""


def test_ranks_of_a_host_share_the_ancestor_that_set_their_variables(monkeypatch):
    """Whatever shells lie between."""
    seen = []
    monkeypatch.setattr(launchers, "_launcher_pid", lambda name: seen.append(name) or 4711)
    port = find_launcher(hydra())[1]["MASTER_PORT"]
    assert port == str(20000 + zlib.crc32(b"pid 4711") % 12000)
    assert seen == ["PMI_RANK"]
