"""Real ranks with what each launcher sets find their places, and train to torchrun's figures."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from launch.test_launchers import SCRIPT, environment
from torch.utils.data import TensorDataset

import dtrain
from dtrain.errors import LaunchError
from dtrain.testing import run_processes

ROOT = Path(__file__).parents[2]
PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI", "MPI_", "MV2_")
PREFIXES += ("JSM_", "PET_", "KUBERNETES_", "JOB_", "RAY_", "GROUP_", "TORCHELASTIC_")

# ------------------------------------------------------------------- one after another


def ompi(prefix, rank, local=None):
    told = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank if local is None else local}
    return {f"{prefix}{name}": str(value) for name, value in told.items()} | {
        f"{prefix}LOCAL_SIZE": "2"
    }


def launched(rank):
    """Name, the environment of this rank, and the launcher that must be found."""
    numbers = {"RANK": str(rank), "WORLD_SIZE": "2"}
    srun = {
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "n1",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }
    pmi = {"PMI_RANK": str(rank), "PMI_SIZE": "2"}
    hydra = pmi | {"MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": "2"}
    daemons = srun | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0"}  # one a node
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    return [
        ("torchrun", numbers | {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}, "torchrun"),
        ("without LOCAL_RANK", numbers, "torchrun"),
        ("srun", srun, "slurm"),
        ("srun --mpi=pmi2", srun | pmi | {"PMI_JOBID": "7.0"}, "slurm"),
        ("Open MPI", ompi("OMPI_COMM_WORLD_", rank), "mpi"),
        ("Open MPI, mapped by socket", ompi("OMPI_COMM_WORLD_", rank, 1 - rank), "mpi"),
        ("Open MPI in a SLURM job", daemons | ompi("OMPI_COMM_WORLD_", rank), "mpi"),
        ("MPICH in a SLURM job", daemons | hydra, "mpi"),
        ("MVAPICH", ompi("MV2_COMM_WORLD_", rank), "mpi"),
        ("PMI alone", pmi, "mpi"),
        ("jsrun", ompi("OMPI_COMM_WORLD_", rank) | ompi("JSM_NAMESPACE_", rank), "lsf"),
        ("an older PyTorchJob", pod | numbers, "kubernetes"),
        ("PyTorchJob", pod | numbers | {"PET_NNODES": "2", "PET_NODE_RANK": "0"}, "kubernetes"),
        ("indexed Job", {"JOB_COMPLETION_INDEX": str(rank), "WORLD_SIZE": "2"}, "kubernetes"),
        ("Ray", numbers | {"LOCAL_RANK": str(rank), "RAY_RAYLET_PID": "1"}, "ray"),
        ("the script", {}, "script"),
        ("the script, where torchrun is another", {"RANK": "0", "WORLD_SIZE": "1"}, "script"),
    ]


def train():
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    model = torch.nn.Linear(3, 1).double()
    trainer = dtrain.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, x: (model(x[0]) - x[0].sum(1, True)).square().mean(),
        sinks=[],
    )
    trainer.fit(TensorDataset(x), batch_size=6, epochs=2)
    return model.weight.flatten().tolist()


def one_after_another():
    rank, port = int(os.environ["RANK"]), os.environ["MASTER_PORT"]
    told = {}
    for life, (name, variables, _) in enumerate(launched(rank)):
        for key in [key for key in os.environ if key.startswith(PREFIXES)]:
            del os.environ[key]
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(variables | where)
        # The parent serves the store, for all of them.
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(life)
        opens_itself = name.startswith(("Ray", "the script"))
        if opens_itself:
            store = None
            if name != "Ray":
                own = dist.TCPStore("127.0.0.1", int(port), is_master=False)
                store = dist.PrefixStore(name, own)
            group = {"store": store, "rank": rank, "world_size": 2} if store else {}
            dist.init_process_group("gloo", **group)
        if name.startswith("the script"):
            del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        with dtrain.init(seed=3) as world:
            who = world.rank, world.size, world.launcher, world.local_rank
            cores = os.environ.get("LOCAL_WORLD_SIZE")
            told[name] = (*who, cores, train())
        if name in ("srun", "without LOCAL_RANK"):  # once more, in what the first has left
            with dtrain.init(seed=3) as world:
                assert (world.rank, world.size, world.launcher, world.local_rank) == who
        assert dist.is_initialized() == opens_itself
        if opens_itself:
            dist.destroy_process_group()
    return told


@pytest.mark.slow
def test_ranks_find_their_places_under_each_launcher():
    everyones = run_processes(one_after_another, 2, timeout_s=100)
    figures = everyones[0]["torchrun"][-1]
    assert len(figures) == 3
    for rank, told in enumerate(everyones):
        for name, _, launcher in launched(rank):
            local = {"Open MPI, mapped by socket": 1 - rank}.get(name, rank)
            here = "2"
            if name in ("PyTorchJob", "indexed Job"):  # each in a pod of its own
                local, here = 0, "1"
            if name.startswith(("Ray", "the script")):  # who opened the group; nothing is added
                here = None
            assert told[name] == (rank, 2, launcher, local, here, figures), name


def of_one_rank():
    rank = os.environ["RANK"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dtrain.init()
    except LaunchError as error:
        return rank, str(error)
    finally:
        dist.destroy_process_group()
    return rank, "nothing"


def test_a_group_of_one_rank_under_torchrun_is_refused_in_words():
    for rank, (own, words) in enumerate(run_processes(of_one_rank, 2, timeout_s=60)):
        assert own == str(rank)
        assert "opened a process group of one rank, but torchrun started 2" in words


# ------------------------------------------------------------------- manifests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pods")
    (folder / "train.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def by_torchrun(folder):
    """What two ranks of torchrun make of the script."""
    (folder / "out").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*command, "train.py", "out"], cwd=folder, env=environment(folder), check=True)
    return json.loads((folder / "out" / "0.json").read_text())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def containers(manifest):
    """All containers of a manifest, wherever its kind has them."""
    if isinstance(manifest, dict):
        found = [one for one in manifest.get("containers", []) if "name" in one]
        for key, value in manifest.items():
            found += containers(value) if key != "containers" else []
        return found
    return [one for part in manifest for one in containers(part)] if type(manifest) is list else []


def pod(manifest, index, **set_by_controller):
    """What runs in the pod with this index: command and environment."""
    (spec,) = containers(manifest)[-1:] if index else containers(manifest)[:1]
    env = dict(set_by_controller)
    for one in spec.get("env", []):
        field = one.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        assert "value" in one or field.endswith("job-completion-index']"), one
        env[one["name"]] = str(one.get("value", index))
    command = [*spec["command"], *spec.get("args", [])]
    command = [sys.executable if word == "python" else word for word in command]
    return command, env


def controllers_own(name, manifest, index, port):
    """What Kubernetes and the operators add; from their sources."""
    common = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    if name == "pytorchjob":
        replicas = manifest[0]["spec"]["pytorchReplicaSpecs"]
        assert {kind: one["replicas"] for kind, one in replicas.items()} == {
            "Master": 1,
            "Worker": 1,
        }
        return common | {
            "PYTHONUNBUFFERED": "1",
            "MASTER_PORT": port,
            "MASTER_ADDR": "localhost",
            "WORLD_SIZE": "2",
            "RANK": str(index),
            "PET_NPROC_PER_NODE": "auto",
            "PET_NODE_RANK": str(index),
            "PET_NNODES": "2",
            "PET_MASTER_PORT": port,
            "PET_MASTER_ADDR": "localhost",
        }
    if name == "trainjob":
        assert manifest[0]["spec"]["trainer"]["numNodes"] == 2
        return common | {
            "PET_NNODES": "2",
            "PET_NPROC_PER_NODE": str(manifest[0]["spec"]["trainer"]["numProcPerNode"]),
            "PET_NODE_RANK": str(index),
            "PET_MASTER_ADDR": "localhost",
            "PET_MASTER_PORT": port,
            "JOB_COMPLETION_INDEX": str(index),
        }
    return common | {"JOB_COMPLETION_INDEX": str(index)}


def manifest_of(name, port):
    text = (ROOT / "launch" / "kubernetes" / f"{name}.yaml").read_text()
    # Here both pods are this machine, without GPUs.
    for pods_name in ("train-pods-0-0.train", "train-0.train"):
        text = text.replace(pods_name, "localhost")
    for here, there in (
        ("29500", port),
        ("--nproc-per-node=8", "--nproc-per-node=1"),
        ("numProcPerNode: 8", "numProcPerNode: 1"),
        ("cd /work && ", ""),
    ):
        text = text.replace(here, there)
    manifests = list(yaml.safe_load_all(text))
    if name == "trainjob":  # its containers are in the runtime; it has one trainer
        manifests[0]["containers"] = [manifests[0]["spec"]["trainer"] | {"name": "node"}]
    return manifests


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pytorchjob", "trainjob", "jobset", "indexed-job"])
def test_a_manifests_pods_train_together(folder, by_torchrun, name):
    port = free_port()
    manifest = manifest_of(name, port)
    out = folder / f"out-{name}"
    out.mkdir()
    pods = []
    try:
        for index in range(2):
            own = controllers_own(name, manifest, index, port)
            command, env = pod(manifest, index, **own)
            if command[0] == "bash":
                command[-1] += f" {out.name}"
            else:
                command.append(out.name)
            env = {k: v for k, v in environment(folder).items() if not k.startswith("PET_")} | env
            path = f"{Path(sys.executable).parent}:{env['PATH']}"
            pods.append(
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env=env | {"PATH": path},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        for one in pods:
            output, _ = one.communicate(timeout=90)
            assert one.returncode == 0, output
    finally:
        for one in pods:
            one.kill()
            one.communicate()
    for rank in range(2):
        told = json.loads((out / f"{rank}.json").read_text())
        assert (told["rank"], told["local_rank"], told["size"]) == (rank, 0, 2)
        assert told["launcher"] == ("torchrun" if name in ("trainjob", "jobset") else "kubernetes")
        assert (told["loss"], told["weights"]) == (by_torchrun["loss"], by_torchrun["weights"])


# ------------------------------------------------------------------- hosts of PBS and LSF

HOSTS_SH = ["bash", str(ROOT / "launch" / "hosts.sh")]


def on_path(folder, name, script):
    """An environment in which a command is what ``script`` does."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / "bin" / name).chmod(0o755)
    env = environment(folder)
    return env | {"PATH": f"{folder / 'bin'}:{env['PATH']}"}


@pytest.mark.slow
def test_the_hosts_of_a_pbs_job_train_together(folder, by_torchrun):
    env = on_path(folder, "pbs_tmrsh", 'env -i HOME="$HOME" $KEEP bash -c "$2"')
    env["KEEP"] = f"CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 PYTHONPATH={env.get('PYTHONPATH', '')}"
    (folder / "nodes").write_text("localhost\nlocalhost\n127.0.0.1\n")
    (folder / "out-pbs").mkdir()
    env |= {"PBS_NODEFILE": str(folder / "nodes"), "PBS_JOBID": f"{os.getpid()}.server"}
    env |= {"RANKS": "1", "PBS_O_WORKDIR": str(folder)}
    command = [*HOSTS_SH, "train.py", "out-pbs"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        told = json.loads((folder / "out-pbs" / f"{rank}.json").read_text())
        assert (told["rank"], told["local_rank"], told["size"]) == (rank, 0, 2)
        assert (told["loss"], told["weights"]) == (by_torchrun["loss"], by_torchrun["weights"])


def test_the_hosts_of_an_lsf_job_are_each_started_once(folder):
    env = on_path(folder, "blaunch", 'echo "on $1: $2"; [[ $1 != beta ]] || exit 3')
    env |= {"LSB_MCPU_HOSTS": "alpha 4 beta 4", "LSB_JOBID": "12345", "RANKS": "4"}
    command = [*HOSTS_SH, "train.py", "two words"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, cwd=folder)
    assert done.returncode == 3
    for rank, line in enumerate(sorted(done.stdout.splitlines())):
        host = ("alpha", "beta")[rank]
        assert line.startswith(f"on {host}: cd {folder} && exec env PATH=")
        assert f" NNODES=2 NODE_RANK={rank} RDZV_ENDPOINT=alpha:12345 RANKS=4 bash " in line
        assert line.endswith("launch/torchrun.sh train.py two\\ words ")


def test_hosts_must_be_named(folder):
    env = {name: value for name, value in environment(folder).items() if name != "HOSTS"}
    done = subprocess.run([*HOSTS_SH, "x.py"], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr == "hosts.sh: no PBS or LSF job, and HOSTS is empty: which hosts?\n"
