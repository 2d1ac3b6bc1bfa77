"""What SLURM says of its jobs and partitions, and where it puts a job's log."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from subprocess import DEVNULL

_PATIENCE_S = 20.0
#: What ends a text of ``scontrol show -o`` for "as much as you like".
_NO_LIMIT = ("UNLIMITED", "INFINITE", "NONE", "")


def ask(*command: str) -> str | None:
    """Returns what one of SLURM's commands prints; None without it, or where it is refused."""
    try:
        return subprocess.check_output(
            command, stdin=DEVNULL, stderr=DEVNULL, text=True, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.SubprocessError):
        return None


def facts(line: str) -> dict[str, str]:
    """Returns the ``Name=value`` of a line of ``scontrol show -o``; of two alike the first."""
    name = r"(?<!\S)[A-Za-z/:]+="
    found = re.findall(rf"({name})(.*?)\s*(?=$|{name})", line)
    return {word.rstrip("="): value for word, value in reversed(found)}


def minutes(text: str) -> float | None:
    """Returns a time limit as SLURM writes it, such as 1-12:00:00; None if it is no limit.

    Raises ValueError where it is no time.
    """
    if text.upper() in _NO_LIMIT:
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # days-hours:minutes:seconds
        hours, mins, secs = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, mins, secs = parts
    else:  # minutes:seconds
        hours, (mins, secs) = 0, (*parts, 0)[:2]
    return (int(days or 0) * 24 + hours) * 60 + mins + secs / 60


def log_path(pattern: str, *, job: str, name: str, user: str, array: bool, folder: Path) -> Path:
    """Returns where SLURM writes what a batch script prints, as ``sbatch --output`` says it.

    What is not known before the job runs, such as its node, is ``*``; so is the task of an array.
    """
    if "\\" in pattern:
        return folder / pattern.replace("\\", "")  # then nothing is replaced
    known = {"%": "%", "x": name, "u": user, "A": job, "j": job, "n": "0", "t": "0"}
    known |= {"J": job, "s": "batch", "a": "4294967294"}
    if array:
        known |= {"a": "*", "j": "*", "J": "*"}  # each task has a number of its own

    def filled(found: re.Match[str]) -> str:
        value = known.get(found[2], "*")
        return value.zfill(int(found[1] or 0)) if value.isdigit() else value

    return folder / re.sub(r"%(\d*)([%a-zA-Z])", filled, pattern)


def lacking(
    *, partition: str | None, nodes: int, time: str | None, gpus: int, cpus: int
) -> str | None:
    """Returns in words why no partition (of those named, else the default) can take a job.

    None where one can, or where SLURM cannot be asked. ``gpus`` and ``cpus`` are those of a node.
    """
    shown = ask("scontrol", "show", "partition", "-o")
    listed = ask("sinfo", "-h", "-N", "-o", "%R|%c|%G")
    if not shown or listed is None:
        return None
    every = {one["PartitionName"]: one for line in shown.splitlines() if (one := facts(line))}
    has: dict[str, tuple[int, int]] = {}  # CPUs and GPUs of the largest node
    for line in listed.splitlines():
        name, its_cpus, gres = line.split("|")
        most = has.get(name, (0, 0))
        has[name] = max(most[0], int(re.sub(r"\D.*", "", its_cpus))), max(most[1], _gpus(gres))
    troubles = {
        name: _troubles(one, has.get(name), nodes, time, gpus, cpus) for name, one in every.items()
    }
    named = partition.split(",") if partition else [n for n in every if _is_default(every[n])]
    chosen = {name: troubles[name] for name in named or every if name in every}
    if not chosen or not all(chosen.values()):
        return None  # or sbatch itself refuses
    words = "; ".join(f"partition {name} {', '.join(what)}" for name, what in chosen.items())
    others = [name for name, what in troubles.items() if not what]
    return words + (f". It would fit into {' or '.join(others)} (--partition)" if others else "")


def _is_default(partition: Mapping[str, str]) -> bool:
    return partition.get("Default") == "YES"


def _troubles(
    partition: Mapping[str, str],
    has: tuple[int, int] | None,
    nodes: int,
    time: str | None,
    gpus: int,
    cpus: int,
) -> list[str]:
    found = []
    most = [partition.get(name, "") for name in ("TotalNodes", "MaxNodes")]
    if (most_nodes := min((int(n) for n in most if n.isdigit()), default=nodes)) < nodes:
        found.append(f"gives a job {most_nodes} nodes at most, and {nodes} are asked for")
    if has is not None and has[0] < cpus:
        found.append(f"has nodes of {has[0]} CPUs at most, and {cpus} are asked for")
    if has is not None and has[1] < gpus:
        found.append(f"has nodes of {has[1]} GPUs at most, and {gpus} are asked for")
    try:
        wanted, limit = minutes(time or ""), minutes(partition.get("MaxTime", ""))
    except ValueError:
        return found  # sbatch has words for it
    if wanted is not None and limit is not None and limit < wanted:
        found.append(f"gives a job {partition['MaxTime']} at most, and {time} is asked for")
    return found


def _gpus(gres: str) -> int:
    """Returns how many GPUs a node has that SLURM lists as ``gpu:a100:4(S:0-1),gpu:2``."""
    return sum(int(n) for n in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)(?=[,(]|$)", gres))


def tasks_in_queue(jobs: Sequence[str]) -> dict[int, str]:
    """Returns which tasks of these arrays wait or run, and of which job each is."""
    shown = ask("squeue", "-h", "-r", "-j", ",".join(jobs), "-o", "%K %F") if jobs else None
    found = [line.split() for line in (shown or "").splitlines()]
    return {int(task): job for task, job in found if task.isdigit()}


def describe_job(job: str) -> list[tuple[str, str]]:
    """Returns how SLURM says a job stands, as names and words."""
    shown = ask("scontrol", "show", "job", "-o", job)
    if not shown:
        told = ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,End,Restarts")
        if told and told.strip():
            state, end, *_ = f"{told.splitlines()[-1]}||".split("|")
            return [("job", f"{job}: {state}, ended {end}")]
        return [("job", f"{job}: SLURM no longer knows it, or is not here to be asked")]
    job_facts = facts(shown.splitlines()[0])
    state, reason = job_facts.get("JobState", "?"), job_facts.get("Reason", "None")
    where = job_facts.get("NodeList", "(null)")
    restarts = job_facts.get("Restarts", "0")
    words = state + (f" ({reason})" if reason != "None" else "")
    words += f" on {where}" if where not in ("(null)", "") else ""
    found = [("job", f"{job}: {words}"), ("restarts", restarts)]
    over = state not in ("RUNNING", "PENDING", "SUSPENDED", "CONFIGURING", "REQUEUED")
    end = job_facts.get("EndTime", "Unknown")
    if end != "Unknown":
        found.append(("ended" if over else "ends", _when(end) if over else f"{_when(end)} at most"))
    if "StdOut" in job_facts:
        found.append(("log", job_facts["StdOut"]))
    return found


def _when(text: str) -> str:
    try:
        return str(datetime.fromisoformat(text))
    except ValueError:
        return text
