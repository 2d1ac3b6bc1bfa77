"""What launched this process, and which rank it is.

Ranks: all, local.
"""

import re
from collections.abc import Mapping

from dtrain.errors import LaunchError

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def find_launcher(env: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Says what launched this process, and the rendezvous variables that follow from it.

    Args:
        env: the environment.

    Returns:
        ``"torchrun"``, ``"slurm"`` or ``"solo"``; and the variables to add to the environment.

    Raises:
        LaunchError: some of torchrun's variables are set and others are not, or a number is
            no number.
    """
    given = [name for name in _RENDEZVOUS if env.get(name)]
    # MASTER_ADDR and MASTER_PORT alone are often left over in cluster profiles.
    if any(name in given for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        missing = [name for name in _RENDEZVOUS if name not in given]
        if missing:
            raise LaunchError(
                f"the environment has {_show(env, given)} but not {', '.join(missing)}. Start "
                "with torchrun (`torchrun --nproc-per-node=2 train.py`), or unset them all to "
                "run in one process."
            )
        numbers = {name: _number(env, name) for name in _RENDEZVOUS if name != "MASTER_ADDR"}
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
        tasks_here = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
        return "slurm", {
            "RANK": env["SLURM_PROCID"],
            "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": tasks_here[0] if tasks_here else "1",
            "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(nodes),
            # Two jobs on a node must not meet: the port follows from the job's number.
            "MASTER_PORT": env.get("MASTER_PORT")
            or str(20000 + _number(env, "SLURM_JOB_ID") % 20000),
        }
    return "solo", {}


def first_host(nodelist: str) -> str:
    """Returns the first host of a SLURM node list: ``gpu[03-05,9],x1`` gives ``gpu03``."""
    # The first entry ends at the first comma outside of brackets; of each bracket, the first
    # number of the first range counts.
    entry = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodelist)
    host = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", entry[0]) if entry is not None else ""
    if not host or nodelist.startswith("["):
        raise LaunchError(
            f"cannot read the first host from SLURM's node list {nodelist!r}; set MASTER_ADDR to "
            "the host of task 0"
        )
    return host


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise LaunchError(f"{name}={env[name]!r} is no number") from None


def _show(env: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{name}={env[name]}" for name in names)
