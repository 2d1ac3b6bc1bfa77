"""``dtrain submit --status``: where a run and its SLURM job stand."""

import json
import time
from pathlib import Path
from typing import Any

from dtrain.cluster import describe_job
from dtrain.errors import ConfigError


def describe(run_dir: Path) -> str:
    """Returns a few lines; also where the job is gone, or there is no SLURM.

    Raises ConfigError where there is no run.
    """
    status, writer = _read(run_dir / "status.json"), _read(run_dir / ".writer")
    if not status:
        raise ConfigError(f"{run_dir} holds no run: there is no status.json that can be read")
    reason = str(status.get("reason") or "").split("\n")[0]
    state, job = status.get("status"), writer.get("job")
    rows = [
        ("run", f"{run_dir}: {state}" + (f", {reason}" if reason else "")),
        ("step", f"{status.get('step')}, as of {_time(status.get('updated'))}"),
    ]
    if failures := status.get("failures"):
        rows.append(("failures", f"{failures} in a row"))
    scheduler = writer.get("scheduler", "SLURM")
    told = describe_job(str(job)) if job and scheduler == "SLURM" else []
    if job and not told:
        rows.append(("job", f"{job} of {scheduler}, which is not asked"))
    elif not job:
        rows.append(("job", "not known: the run has left no word of a SLURM job"))
    rows += told
    lives = any(f": {word}" in told[0][1] for word in _ALIVE) if told else False
    if state == "running" and told and not lives:
        rows.append(("next", "it was ended before it could say why; submitted again, it goes on"))
    elif state in ("preempted", "failed") and not lives:
        again = "mend the cause, then submit it" if state == "failed" else "submitted"
        rows.append(("next", f"{again} again with the same run_dir; it goes on where it was saved"))
    return "\n".join(f"{name:<9} {words}" for name, words in rows)


_ALIVE = ("RUNNING", "PENDING", "SUSPENDED", "CONFIGURING", "COMPLETING", "REQUEUE")


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _time(seconds: object) -> str:
    if not isinstance(seconds, int | float):
        return "an unknown time"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
