"""Who may write to a run's folder: one start of the run, the newest.

Two things see to that. A lock on ``run_dir/.writer.lock``, which the kernel takes back from a
process that is killed: a second start on the same machine waits for it, and gives up. And a token
in ``run_dir/.writer``, for another machine: an old start that is cut off may live on, and keep its
lock, while the job is begun again elsewhere. Each start leaves a new token; who finds another's
than its own writes nothing any more.

Nothing closes the moment between a look at the token and the rename that follows. It is one system
call long; but a network file system may show an old token for as long as it caches names.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dtrain.checkpoint import disk
from dtrain.distributed import this_machine
from dtrain.errors import RunTaken

#: How long a start waits for the end of the one before; a loader's workers outlive a killed rank.
WAIT_S = 10.0
#: The lock's own files in ``run_dir``.
TOKEN, LOCK = ".writer", ".writer.lock"
_LOOK_EVERY_S = 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class RunLock:
    """This start's right to write to ``run_dir``, which is there. Ranks: rank 0 only."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.token = uuid.uuid4().hex  # names this start, and what it writes aside
        self._token_file = run_dir / TOKEN
        self._lock: int | None = None
        self._is_held = False  # perhaps by the token only

    def take(self) -> None:
        """Makes this start the one that writes; every start before it no longer may.

        Raises RunTaken where another one is alive on this machine, and does not end in time.
        """
        with disk.plain_words(self._token_file):
            self._lock, self._is_held = _lock(self.run_dir), True
            facts = {
                "token": self.token,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "machine": this_machine(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                **job_of(os.environ),
            }
            aside = self.run_dir / f"{TOKEN}-{self.token}"
            disk.write_bytes(aside, json.dumps(facts).encode())
            os.replace(aside, self._token_file)
            disk.sync(self.run_dir)

    def take_again(self) -> None:
        """Goes on after :meth:`release`, if at all; RunTaken where somebody wrote meanwhile."""
        if not self._is_held:
            with disk.plain_words(self._token_file):
                self._lock, self._is_held = _lock(self.run_dir), True
        self.check()

    def check(self) -> None:
        """Raises RunTaken where another start has begun since: this one may not write any more."""
        with disk.plain_words(self._token_file, "cannot be read", *disk.DAMAGE):
            taken = json.loads(self._token_file.read_bytes())["token"] != self.token
        if taken:
            raise RunTaken(
                f"another start of this run ({_who(self.run_dir)}) writes to {self.run_dir} now, "
                "so this one ends, and leaves it as it is"
            )

    def release(self) -> None:
        """Lets another start begin at once; a second call does nothing."""
        self._is_held = False
        if self._lock is not None:
            # Not by closing alone: a loader's worker may have been forked with a copy of it.
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None


def _lock(run_dir: Path) -> int | None:
    """Returns a handle that holds the lock; None where that cannot be had, and the token decides.

    So it is where the file system knows no locks, and where the lock is kept for one that is not
    alive on this machine: it is of another host, which nobody can ask, or a worker was left behind.
    """
    handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    deadline, told, never = time.monotonic() + WAIT_S, False, threading.Event()
    with ExitStack() as unless_locked:
        unless_locked.callback(os.close, handle)
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                unless_locked.pop_all()
                return handle
            except BlockingIOError:
                who = _who(run_dir)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return None
                raise
            if time.monotonic() >= deadline:
                if _may_live_here(run_dir):
                    raise RunTaken(
                        f"another start of this run ({who}) is alive and writes to {run_dir}. Wait "
                        "for its end, or choose another run_dir."
                    )
                _say(f"{run_dir} is taken over from another start of this run ({who})")
                return None
            if not told:
                told = True
                _say(
                    f"another start of this run ({who}) still writes to {run_dir}; waiting up to "
                    f"{WAIT_S:g} s for its end"
                )
            never.wait(_LOOK_EVERY_S)


def _say(words: str) -> None:
    sys.stderr.write(f"dtrain: {words}\n")


def _writer(run_dir: Path, *names: str) -> dict[str, Any]:
    """Returns what the newest start left of itself; empty where it lacks one of ``names``."""
    try:
        facts = json.loads((run_dir / TOKEN).read_bytes())
        return {name: facts[name] for name in names}
    except (OSError, *disk.DAMAGE):
        return {}


def _may_live_here(run_dir: Path) -> bool:
    facts, here = _writer(run_dir, "machine", "pid"), this_machine()
    if not facts:
        return True
    return bool(facts["machine"] == here) and (not here or Path(f"/proc/{facts['pid']}").exists())


def _who(run_dir: Path) -> str:
    facts = _writer(run_dir, "pid", "host", "since")
    if not facts:
        return "it has not said which"
    job = _writer(run_dir, "scheduler", "job", "step")  # starts until 0.1 have not said
    of = f", in {job['scheduler']} job {job['job']}" if job else ""
    of += f", step {job['step']}" if job and job["step"] else ""
    return f"pid {facts['pid']} on {facts['host']}{of}, since {facts['since']}"


def job_of(env: Mapping[str, str]) -> dict[str, str]:
    """Returns the job that this process is of, as the scheduler's tools take it; {} outside."""
    if env.get("SLURM_JOB_ID"):
        task = env.get("SLURM_ARRAY_TASK_ID")
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{task}" if task else env["SLURM_JOB_ID"]
        return {"scheduler": "SLURM", "job": job, "step": env.get("SLURM_STEP_ID", "")}
    for scheduler, variable in (("PBS", "PBS_JOBID"), ("LSF", "LSB_JOBID")):
        if env.get(variable):
            return {"scheduler": scheduler, "job": env[variable], "step": ""}
    return {}
