"""Signals, the end of a SLURM job, or of a launcher, ask a run to leave: it saves, and ends."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from subprocess import DEVNULL
from types import FrameType
from typing import Any

from dtrain.errors import ConfigError

# They ask for nothing else, and would by default kill the process.
_SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)
#: What schedulers send before they take a machine away, a terminal that closes, and Ctrl-C.
SIGNALS = (signal.SIGTERM, *_SCHEDULERS, signal.SIGHUP, signal.SIGINT)

# A job is left so many seconds before its end, unless that is more than a tenth of its time.
_MARGIN_S = 120.0
_SHARE = 0.1
_MARGIN_VARIABLE = "DTRAIN_LEAVE_BEFORE_END_S"  # a margin of one's own, in seconds
_PATIENCE_S = 20.0  # scontrol itself gives a controller that is away longer
_TWICE_S = 1.0  # what all processes of a job are sent, torchrun passes on to its ranks once more
_LOOK_S = 1.0  # how often to look whether the launcher is there


class Signals:
    """Turns each signal into one call of ``ask`` with its name, and puts the old handlers back.

    In a SLURM job, USR1 and USR2 stay harmless: it may have sent one while the run came to its
    end, and a run that is finished must not be killed for it.

    ``ask`` must do no more than take note: the main thread may be anywhere. A second Ctrl-C (not
    within a second) ends the process at once, with exit code 130. A signal for which the script has
    a handler of its own, or which it ignores, is left alone. Children that are forked meanwhile die
    of a TERM, as they would without this; the other signals are their parent's business.

    Ranks: all, local; one rank's signal suffices.
    """

    def __init__(self, ask: Callable[[str], None]) -> None:
        self._ask = ask
        self._before: dict[int, Any] = {}
        self._seen: dict[int, float] = {}  # when each came first
        self._process = os.getpid()

    def __enter__(self) -> "Signals":
        # Python lets only the main thread set handlers; elsewhere the caller's stay.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.default_int_handler, _too_late):
                    self._before[number] = before
                    signal.signal(number, self._handle)
        if signal.SIGTERM in self._before:
            _taken.append(self._before[signal.SIGTERM])
        return self

    def __exit__(self, *error: object) -> None:
        if signal.SIGTERM in self._before:
            _taken.clear()
        in_slurm = "SLURM_JOB_ID" in os.environ
        for number, before in self._before.items():
            late = number in _SCHEDULERS and before is signal.SIG_DFL and in_slurm
            signal.signal(number, _too_late if late else before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader worker has inherited the handler: its parent decides
        if number not in self._seen:
            self._seen[number] = time.monotonic()
            self._ask(signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() - self._seen[number] > _TWICE_S:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + signal.SIGINT)


def _too_late(number: int, frame: FrameType | None) -> None:
    """What a scheduler has asked for is done already: the run has ended."""


# What a TERM did before it was taken; and, in a thread that forks just now, that it waits.
_taken: list[Any] = []
_forks = threading.local()


def _before_fork() -> None:
    # Else one that comes before the child has given back the handler would be lost in it.
    _forks.waits = False
    if _taken:
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        _forks.waits = signal.SIGTERM not in held


def _after_fork() -> None:
    if _forks.waits:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _after_fork_in_child() -> None:
    for before in _taken:
        signal.signal(signal.SIGTERM, before)
    _taken.clear()
    _after_fork()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
)


class Launcher:
    """Calls ``ask`` once the launcher is ``gone``, of which the kernel tells nobody.

    Killed outright, torchrun leaves its ranks behind: they would train on, and hold their GPUs. A
    thread looks once a second; not where nobody knows (None).
    """

    def __init__(self, ask: Callable[[str], None], gone: Callable[[], bool] | None) -> None:
        self._ask, self._gone = ask, gone
        self._over = threading.Event()

    def __enter__(self) -> "Launcher":
        if self._gone is not None:
            run = partial(self._run, self._gone)
            threading.Thread(target=run, name="launcher", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def _run(self, gone: Callable[[], bool]) -> None:
        while not self._over.wait(_LOOK_S):
            if gone():
                self._ask("the launcher (torchrun) is gone")
                return


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
    command = ["scontrol", "show", "job", "-o", env["SLURM_JOB_ID"]]
    try:
        shown = subprocess.check_output(
            command, env=plain, stdin=DEVNULL, stderr=DEVNULL, text=True, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no scontrol, as in most containers; or no answer
    return end_shown(shown)


def end_shown(job: str) -> float | None:
    """Returns the ``EndTime`` in what ``scontrol show job -o`` says, in seconds since 1970."""
    end = re.search(r"(?<!\S)EndTime=(\S*)", job)
    try:
        return datetime.fromisoformat(end[1]).timestamp() if end else None  # in local time
    except ValueError:
        return None  # "Unknown": the job has no limit
