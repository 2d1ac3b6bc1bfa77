"""When a SLURM job's time is over; and a request to save and leave a little before."""

import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime

from dtrain.errors import ConfigError

# A job is left so many seconds before its end, unless that is more than a tenth of its time.
_MARGIN_S = 120.0
_SHARE = 0.1
_MARGIN_VARIABLE = "DTRAIN_LEAVE_BEFORE_END_S"  # a margin of one's own, in seconds
_PATIENCE_S = 20.0  # scontrol itself gives a controller that is away longer


class Deadline:
    """Calls ``ask`` with the reason, a margin before the end of this process's SLURM job.

    Not every site sends a signal before it ends a job. A thread asks SLURM when that will be and
    then waits for it, so no step pays for it. It asks again before it speaks: the end may have
    been moved. Outside of a job, where the end cannot be known, or if not ``active`` (one rank's
    request suffices), nothing is done.
    """

    def __init__(
        self, ask: Callable[[str], None], *, active: bool, env: Mapping[str, str] = os.environ
    ) -> None:
        self._ask, self._env, self._margin_s = ask, env, margin_of(env)
        self._active = active and bool(env.get("SLURM_JOB_ID"))
        self._over = threading.Event()

    def __enter__(self) -> "Deadline":
        if self._active:
            threading.Thread(target=self._run, name="deadline", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()  # not waited for: it may be asking SLURM, which takes its time

    def _run(self) -> None:
        end = job_end(self._env)
        if end is None:
            return
        left_s = end - time.time()
        margin_s = min(_MARGIN_S, _SHARE * left_s) if self._margin_s is None else self._margin_s
        while not self._over.wait(min(max(0.0, left_s - margin_s), threading.TIMEOUT_MAX)):
            later = job_end(self._env, fresh=True)
            if later is None or later <= end:
                if not self._over.is_set():
                    self._ask(f"the job ends in {max(0.0, end - time.time()):.0f} seconds")
                return
            end, left_s = later, later - time.time()


def margin_of(env: Mapping[str, str]) -> float | None:
    """Returns the user's margin in seconds, or None for ours; raises ConfigError if it is none."""
    text = env.get(_MARGIN_VARIABLE)
    if not text:
        return None
    try:
        margin_s = float(text)
    except ValueError:
        margin_s = -1.0
    if not margin_s >= 0:
        raise ConfigError(f"{_MARGIN_VARIABLE}={text!r}: must be a number of seconds, 0 or more")
    return margin_s


def job_end(env: Mapping[str, str], *, fresh: bool = False) -> float | None:
    """Returns when the job ends, in seconds since 1970, or None where nobody says.

    It may take some seconds. Where it must be ``fresh``, the environment's word does not count,
    which is as old as the job.
    """
    told = env.get("SLURM_JOB_END_TIME", "")  # since SLURM 23.02
    if told.isdigit() and not fresh:
        return float(told)
    # SLURM_TIME_FORMAT would change how times are written.
    plain = {name: value for name, value in env.items() if name != "SLURM_TIME_FORMAT"}
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", "-o", env["SLURM_JOB_ID"]],
            env=plain,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no scontrol, as in most containers; or no answer
    return end_shown(shown.stdout)


def end_shown(job: str) -> float | None:
    """Returns the ``EndTime`` in what ``scontrol show job -o`` says, in seconds since 1970."""
    end = re.search(r"(?<!\S)EndTime=(\S*)", job)
    try:
        return datetime.fromisoformat(end[1]).timestamp() if end else None  # in local time
    except ValueError:
        return None  # "Unknown": the job has no limit
