"""What launched this process, which rank it is, and what of the host is its own."""

import os
import re
import resource
from collections.abc import Mapping
from contextlib import suppress

import torch

from dtrain.errors import LaunchError

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def find_launcher(env: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Returns ``"torchrun"``, ``"slurm"`` or ``"solo"``, and the variables to add to ``env``."""
    given = [name for name in RENDEZVOUS if env.get(name)]
    # MASTER_ADDR and MASTER_PORT alone are often left over in cluster profiles.
    if any(name in given for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        missing = [name for name in RENDEZVOUS if name not in given]
        if missing:
            raise LaunchError(
                f"the environment has {_show(env, given)} but not {', '.join(missing)}. Start "
                "with torchrun (`torchrun --nproc-per-node=2 train.py`), or unset them all to "
                "run in one process."
            )
        numbers = {name: _number(env, name) for name in RENDEZVOUS if name != "MASTER_ADDR"}
        if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
            raise LaunchError(f"RANK must be from 0 to WORLD_SIZE - 1: {_show(env, given)}")
        return "torchrun", {}
    # Only srun sets SLURM_STEP_NUM_TASKS; in a bare sbatch script one process runs.
    if env.get("SLURM_STEP_NUM_TASKS") and _number(env, "SLURM_STEP_NUM_TASKS") > 1:
        needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
        missing = [name for name in needed if not env.get(name)]
        if missing:
            raise LaunchError(
                f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks, but the environment has no "
                f"{', '.join(missing)}. Start with srun, or unset SLURM_STEP_NUM_TASKS."
            )
        nodes_tasks = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        tasks = [number for number, nodes in nodes_tasks for _ in range(int(nodes or 1))]
        node = _number(env, "SLURM_NODEID") if env.get("SLURM_NODEID") else 0
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
        return "slurm", {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": tasks[node] if node < len(tasks) else "1",
            "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(nodes),
            # Two jobs on a node must not meet: the port follows from the job's number.
            "MASTER_PORT": env.get("MASTER_PORT")
            or str(20000 + _number(env, "SLURM_JOB_ID") % 20000),
        }
    return "solo", {}


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


def allow_files(size: int) -> None:
    """Raises how many files this process may have open, as far as it may itself."""
    # Each of up to three gloo groups is a connection to every other rank; the usual limit is 1024.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * size + 1024
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # it may be enough as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def share_cores() -> None:
    """Gives torch this rank's part of the host's cores, unless it was told how many."""
    if not os.environ.get("OMP_NUM_THREADS"):
        threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def has_gpu() -> bool:
    """There is one, and ``accelerate launch --cpu`` did not say to leave it alone."""
    told_not_to = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return torch.cuda.is_available() and not told_not_to


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise LaunchError(f"{name}={env[name]!r} is no number") from None


def _show(env: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{name}={env[name]}" for name in names)
