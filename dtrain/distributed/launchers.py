"""Who launched this process, by the variables that each launcher sets."""

import os
import re
import socket
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dtrain.errors import LaunchError

#: Torch's own variables.
RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_PORT = "29500"  # torchrun's own, where nothing tells one job from another

Found = tuple[str, dict[str, str]]


class _Names(NamedTuple):
    """What a launcher calls a rank's place; and what names the start, the same on all hosts."""

    rank: str
    size: str
    local_rank: str
    local_size: str
    starts: tuple[str, ...] = ()


def _names(prefix: str, *starts: str) -> _Names:
    parts = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    rank, size, local_rank, local_size = (prefix + part for part in parts)
    return _Names(rank, size, local_rank, local_size, starts)


_JSM = _names("JSM_NAMESPACE_", "PMIX_NAMESPACE")
_OMPI = _names("OMPI_COMM_WORLD_", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
_MV2 = _names("MV2_COMM_WORLD_")
_PALS = _names("PMI_", "PALS_APID")
_HYDRA = _Names(
    "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", starts=("I_MPI_HYDRA_UUID",)
)


def find_launcher(env: Mapping[str, str]) -> Found:
    """Returns who launched this process, and the variables to add to ``env``; "solo" if nobody did.

    LOCAL_RANK may still be missing: ranks can find that out among themselves.
    """
    given = [name for name in RENDEZVOUS if env.get(name)]
    # MASTER_ADDR and MASTER_PORT alone are often left over in cluster profiles.
    if given in ([*RENDEZVOUS], [name for name in RENDEZVOUS if name != "LOCAL_RANK"]):
        return _torchrun(env, given)
    for ask in _LAUNCHERS:
        if (found := ask(env)) is not None:
            break
    else:
        told = [name for name in given if not name.startswith("MASTER_")]
        if not told or (told == ["WORLD_SIZE"] and env["WORLD_SIZE"] == "1"):
            return "solo", {}
        missing = [name for name in RENDEZVOUS if name not in given]
        raise LaunchError(
            f"the environment has {_show(env, given)} but not {', '.join(missing)}. Start "
            "with torchrun (`torchrun --nproc-per-node=2 train.py`), or unset them all to "
            "run in one process."
        )
    launcher, variables = found
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # set by hand, as many batch scripts do
        if env.get(name) and _number(env, name) != int(variables.get(name, env[name])):
            raise LaunchError(
                f"the environment has {name}={env[name]}, but by what {launcher} has set it is "
                f"{variables[name]}: unset {name}, which {launcher} makes superfluous (or set all "
                f"of {', '.join(RENDEZVOUS)})"
            )
    return launcher, variables


# ------------------------------------------------------------------------------ the launchers


def _torchrun(env: Mapping[str, str], given: list[str]) -> Found:
    """Torch's own variables: of torchrun, or whatever sets the same (Ray, PyTorchJob, a script)."""
    numbers = {name: _number(env, name) for name in given if name != "MASTER_ADDR"}
    if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise LaunchError(f"RANK must be from 0 to WORLD_SIZE - 1: {_show(env, given)}")
    if "TORCHELASTIC_RUN_ID" in env:
        tasks = env.get("SLURM_STEP_NUM_TASKS") or "1"
        if env.get("GROUP_WORLD_SIZE") == "1" and tasks != "1":
            raise LaunchError(
                f"srun started {tasks} tasks (SLURM_STEP_NUM_TASKS={tasks}), and each has started "
                "a torchrun that knows nothing of the others (GROUP_WORLD_SIZE=1): they would "
                f"train {tasks} times, into the same run_dir. For one training on all nodes: "
                "`dtrain submit --nodes N`, slurm/many_nodes.sbatch, or torchrun with --nnodes and "
                "--rdzv-endpoint; on one node: `srun --ntasks=1 torchrun ...`. If each is to train "
                "by itself: unset SLURM_STEP_NUM_TASKS."
            )
        return "torchrun", {}
    if "RAY_RAYLET_PID" in env:
        return "ray", {}
    if "LOCAL_RANK" in given or "KUBERNETES_SERVICE_HOST" not in env:
        return "torchrun", {}
    # Kubeflow's PyTorchJob: RANK is the pod's, and WORLD_SIZE counts processes.
    if (pods := env.get("PET_NNODES")) and pods != env["WORLD_SIZE"]:
        raise LaunchError(
            f"{env['WORLD_SIZE']} ranks are to run in {pods} pods (WORLD_SIZE={env['WORLD_SIZE']}, "
            f"PET_NNODES={pods}, PET_NPROC_PER_NODE={env.get('PET_NPROC_PER_NODE', '')}), but this "
            "is a pod's only process: start it with torchrun, which reads these (`torchrun "
            'train.py`), or set nprocPerNode: "1"'
        )
    return "kubernetes", {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} if pods else {}


def _jsrun(env: Mapping[str, str]) -> Found | None:
    """The jsrun of an LSF job; it sets Open MPI's variables as well."""
    return _mpi(env, _JSM, "jsrun", "lsf")


def _open_mpi(env: Mapping[str, str]) -> Found | None:
    """Open MPI's mpirun. In a SLURM job its daemons are srun's tasks, with other numbers."""
    return _mpi(env, _OMPI, "mpirun")


def _mvapich(env: Mapping[str, str]) -> Found | None:
    return _mpi(env, _MV2, "mpirun")


def _hydra(env: Mapping[str, str]) -> Found | None:
    """The mpiexec of MPICH and Intel MPI; only this one sets MPI_LOCALRANKID."""
    return _mpi(env, _HYDRA, "mpiexec") if env.get(_HYDRA.local_rank) else None


def _slurm(env: Mapping[str, str]) -> Found | None:
    """Tasks of srun, which alone sets SLURM_STEP_NUM_TASKS; with ``--mpi``, PMI's as well."""
    if not _several(env, "SLURM_STEP_NUM_TASKS"):
        return None
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
    if missing := [name for name in needed if not env.get(name)]:
        raise LaunchError(
            f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks, but the environment has no "
            f"{', '.join(missing)}. Start with srun, or unset SLURM_STEP_NUM_TASKS."
        )
    nodes_tasks = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    tasks = [number for number, nodes in nodes_tasks for _ in range(int(nodes or 1))]
    node = _number(env, "SLURM_NODEID") if env.get("SLURM_NODEID") else 0
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    step = _number(env, "SLURM_STEP_ID") if env.get("SLURM_STEP_ID") else 0
    return "slurm", {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks[node] if node < len(tasks) else "1",
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(nodes),
        # Jobs on a node must not meet, nor steps of a job: the port follows from both numbers.
        "MASTER_PORT": env.get("MASTER_PORT") or _port(_number(env, "SLURM_JOB_ID") + 1009 * step),
    }


def _pals(env: Mapping[str, str]) -> Found | None:
    """The mpiexec of HPE Cray's PALS (with PBS), or another that sets PMI's variables only."""
    return _mpi(env, _PALS, "mpiexec")


def _kubernetes(env: Mapping[str, str]) -> Found | None:
    """A pod of an indexed Job (a JobSet has such), or of Kubeflow's TrainJob without torchrun."""
    asked = [name for name in ("PET_NNODES", "PET_NPROC_PER_NODE") if env.get(name)]
    if any(re.search(r"[2-9]|\d\d", env[name]) for name in asked):
        raise LaunchError(
            f"the environment has {_show(env, asked)}, which are meant for torchrun, but it was "
            "not started: `torchrun train.py` reads them (in a TrainJob: command: [torchrun, "
            f"train.py]). To run in one process: unset {' '.join(asked)}."
        )
    if not env.get("JOB_COMPLETION_INDEX") or not _several(env, "WORLD_SIZE"):
        return None
    index, size = _number(env, "JOB_COMPLETION_INDEX"), _number(env, "WORLD_SIZE")
    if not env.get("MASTER_ADDR") or not 0 <= index < size:
        raise LaunchError(
            "a pod of an indexed Job needs WORLD_SIZE, the Job's completions, and MASTER_ADDR, the "
            "name of the pod with index 0 (such as train-0.train, with a headless Service train: "
            "launch/kubernetes/indexed-job.yaml). Here are "
            + _show(env, ["JOB_COMPLETION_INDEX", "WORLD_SIZE", "MASTER_ADDR"])
        )
    return "kubernetes", {
        "RANK": str(index),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_PORT": env.get("MASTER_PORT") or _PORT,
    }


# In this order: an MPI's ranks have the variables of the scheduler's tasks that they run in, too.
_LAUNCHERS = (_jsrun, _open_mpi, _mvapich, _hydra, _slurm, _pals, _kubernetes)


# ------------------------------------------------------------------------------ what they share


def _mpi(
    env: Mapping[str, str], names: _Names, command: str, launcher: str = "mpi"
) -> Found | None:
    if not _several(env, names.size):
        return None
    size = env[names.size]
    if not env.get(names.rank):
        raise LaunchError(
            f"{command} started {size} ranks ({names.size}={size}), but the environment has no "
            f"{names.rank}. Start with {command}, or unset {names.size} to run in one process."
        )
    found = {"RANK": env[names.rank], "WORLD_SIZE": size}
    if env.get(names.local_rank):
        found["LOCAL_RANK"] = env[names.local_rank]
    if env.get(names.local_size):
        found["LOCAL_WORLD_SIZE"] = env[names.local_size]
    for name in found:
        _number(found, name)
    one_host = found.get("LOCAL_WORLD_SIZE") == size
    start = next((env[name] for name in names.starts if env.get(name)), "")
    if not start and one_host:
        start = f"pid {_launcher_pid(names.rank)}"
    jobs = ("PBS_JOBID", "LSB_JOBID", "SLURM_JOB_ID")
    start = start or next((env[name] for name in jobs if env.get(name)), "")
    found["MASTER_PORT"] = env.get("MASTER_PORT") or (_port(start) if start else _PORT)
    found["MASTER_ADDR"] = env.get("MASTER_ADDR") or ("localhost" if one_host else _listed(env))
    if not found["MASTER_ADDR"] or (
        found["RANK"] == "0" and not env.get("MASTER_ADDR") and _is_elsewhere(found["MASTER_ADDR"])
    ):
        guess = found["MASTER_ADDR"]
        wrong = f"the job's first host is {guess}, but rank 0 is on {socket.gethostname()}"
        raise LaunchError(
            f"{command} started {size} ranks on several hosts "
            f"({_show(env, [name for name in names[1:4:2] if env.get(name)])}), and "
            f"{wrong if guess else 'nothing says on which rank 0 is'}: set MASTER_ADDR to its "
            "name. From the first host: `mpirun -x MASTER_ADDR=$(hostname) ...` (Open MPI), "
            "`mpiexec -genv MASTER_ADDR $(hostname) ...` (MPICH, Intel MPI)."
        )
    return launcher, found


def _listed(env: Mapping[str, str]) -> str:
    """The first host of the job that a scheduler has set up; "" where none says.

    jsrun's ranks run on none that is called batch or login, which LSF lists first.
    """
    if nodes := env.get("SLURM_JOB_NODELIST"):
        return first_host(nodes)
    hosts = _allocated(env) or [env.get("HYDRA_BSTRAP_LOCALHOST", "")]
    return next((host for host in hosts if not re.match("batch|login", host)), hosts[0])


def _allocated(env: Mapping[str, str]) -> list[str]:
    """The hosts that PBS or LSF gave the job, each once."""
    hosts = env.get("LSB_MCPU_HOSTS", "").split()[::2] or env.get("LSB_HOSTS", "").split()
    if file := env.get("PBS_NODEFILE"):
        with suppress(OSError):  # some have it on the first host only
            hosts = Path(file).read_text().split()
    return list(dict.fromkeys(hosts))


def first_host(nodelist: str) -> str:
    """Returns the first host of a SLURM node list: ``gpu[03-05,9],x1`` gives ``gpu03``."""
    # Up to the first comma outside of brackets; of a bracket, the first number counts.
    entry = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodelist)
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", entry[0]) if entry is not None else ""
    if not host or nodelist.startswith("["):
        raise LaunchError(
            f"cannot read the first host from SLURM's node list {nodelist!r}; set MASTER_ADDR to "
            "the host of task 0"
        )
    return host


def _is_elsewhere(host: str) -> bool:
    """True where ``host`` is known, and none of this machine's addresses."""
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return False  # who looks for it next says so
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return True
    return False


def _launcher_pid(variable: str) -> int:
    """The nearest ancestor without ``variable`` has set it: the same process for all ranks here.

    The parent may be a shell that each rank has for itself.
    """
    pid = os.getppid()
    with suppress(OSError):
        while f"\0{variable}=".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            stat = Path(f"/proc/{pid}/stat").read_text()
            pid = int(stat[stat.rindex(")") + 2 :].split()[1])
    return pid


def _port(start: str | int) -> str:
    """A port for this start, below those that Linux gives to whoever asks for any."""
    number = start if isinstance(start, int) else zlib.crc32(start.encode())
    return str(20000 + number % 12000)


def _several(env: Mapping[str, str], name: str) -> bool:
    return bool(env.get(name)) and _number(env, name) > 1


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise LaunchError(f"{name}={env[name]!r} is no number") from None


def _show(env: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{name}={env.get(name, '')}" for name in names)


# ------------------------------------------------------------------------------ one process


def hint(env: Mapping[str, str]) -> str:
    """What to tell one process that trains alone in a job that was given more; else ""."""
    tasks, hosts = env.get("SLURM_NTASKS") or "1", _allocated(env)
    if env.get("SLURM_JOB_ID") and not env.get("SLURM_STEP_ID") and tasks != "1":
        return (
            f"SLURM gave this job {tasks} tasks (SLURM_NTASKS={tasks}), but one process trains: "
            "`srun python train.py` starts a rank for each"
        )
    if len(hosts) > 1:
        return (
            f"this job has {len(hosts)} hosts ({', '.join(hosts[:4])}{', ...' * (len(hosts) > 4)})"
            ", but one process trains: `mpirun python train.py`, or `launch/hosts.sh train.py`, "
            "starts ranks on all"
        )
    if env.get("PET_NPROC_PER_NODE", "1") != "1":
        return (
            f"PET_NPROC_PER_NODE={env['PET_NPROC_PER_NODE']} is meant for torchrun, but one "
            "process trains: `torchrun train.py` starts a rank for each GPU"
        )
    if env.get("JOB_COMPLETION_INDEX") and not env.get("PET_NNODES") and not env.get("WORLD_SIZE"):
        return (
            f"JOB_COMPLETION_INDEX={env['JOB_COMPLETION_INDEX']}, but nothing says how many pods "
            "train together, so this one trains alone: for one training, set WORLD_SIZE and "
            "MASTER_ADDR (launch/kubernetes/indexed-job.yaml)"
        )
    return ""
