"""Starts ranks quickly: one process imports torch once, and each rank is a fork of it.

It reads a line of JSON from stdin for each launch (:class:`Order`), and once all its ranks have
ended, or were killed for lack of time, answers with one on stdout: their exit codes (negative for
a signal), and whether time was over. When stdin closes, it kills what still runs, and leaves: so
nothing outlives whoever started it, however that ends.
"""

import faulthandler
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from dtrain.trials.runner import FAILED, run_script

#: How long ranks go on after one of them has failed: time to say which one, and why.
GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class Order:
    """A launch."""

    trial: str  # the module whose make_trial(setup, folder) each rank calls
    setup: dict[str, Any]  # for the trial
    folder: str  # for records; each rank's output goes to rank-0.txt and so on
    script: str
    args: list[str]  # of the script
    environments: list[dict[str, str]]  # of each rank, to be added to the server's own
    timeout_s: float  # how long it may take, in seconds


def main() -> None:
    """Serves launches; the process of :class:`~dtrain.trials.launcher.Launcher`."""
    # What scripts need, and takes long to import. The first optimizer imports _dynamo.
    importlib.import_module("torch._dynamo")
    importlib.import_module("dtrain.callbacks")
    # The answers' pipe is kept for itself: what anything prints here goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(sys.stdin, answers)
    os._exit(0)  # nothing is left to tidy up, and torch takes its time over it


def _serve(orders: TextIO, answers: TextIO) -> None:
    for line in iter(orders.readline, ""):
        order = Order(**json.loads(line))
        pids = [_fork(order, rank) for rank in range(len(order.environments))]
        codes: dict[int, int] = {}
        try:
            wanted = _watch(pids, codes, order.timeout_s, orders.fileno())
        finally:
            for pid in pids:
                _kill(pid, ended=pid in codes)
        if not wanted:
            return
        late = len(codes) < len(pids) and not any(codes.values())
        json.dump([[codes.get(pid, -signal.SIGKILL) for pid in pids], late], answers)
        answers.write("\n")
        answers.flush()


def _fork(order: Order, rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = FAILED
    try:
        os.setsid()  # a group of its own, so that its data workers can be killed with it
        nothing = os.open(os.devnull, os.O_RDONLY)
        out = os.open(f"{order.folder}/rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for fd, target in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(fd, target)
        os.environ.update(order.environments[rank])
        # A rank that is stuck says where, before it is killed.
        faulthandler.dump_traceback_later(order.timeout_s * 0.9, file=2)
        trial = importlib.import_module(order.trial).make_trial(order.setup, Path(order.folder))
        code = run_script(trial, order.script, order.args)
    except BaseException:  # noqa: BLE001 -- a fork must end here, and never go on above
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _watch(pids: Sequence[int], codes: dict[int, int], timeout_s: float, orders: int) -> bool:
    """Waits for ranks to end, and takes their exit codes; False if nobody wants them any more."""
    deadline = time.monotonic() + timeout_s
    handles = {os.pidfd_open(pid): pid for pid in pids}
    poll = select.poll()
    poll.register(orders, select.POLLIN | select.POLLHUP)
    for handle in handles:
        poll.register(handle, select.POLLIN)
    try:
        while len(codes) < len(pids) and (left := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000):
                if fd == orders:
                    return False  # nothing is ordered while a launch runs: it was closed
                poll.unregister(fd)
                pid = handles[fd]
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
    finally:
        for handle in handles:
            os.close(handle)
    return True


def _kill(pid: int, *, ended: bool) -> None:
    """Kills what a rank has started, and the rank itself unless it has ended."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it may not have had a group yet
        os.waitpid(pid, 0)
