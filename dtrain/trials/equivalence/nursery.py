"""Starts ranks quickly: one process imports torch once, and each rank is a fork of it.

    python -m dtrain.trials.equivalence.nursery

It reads a line of JSON from stdin for each launch (``Order``) and answers with one on stdout
once all its ranks have ended, or were killed for lack of time. When stdin closes, it kills what
still runs, and leaves: so nothing outlives whoever started it, however that ends.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

# What every script needs, and takes long to import. The first optimizer imports _dynamo.
import torch._dynamo

import dtrain.callbacks
from dtrain.trials.equivalence.orders import FAILED, Answer, Order

#: How long ranks go on after one of them has failed: time to say which one, and why.
GRACE_S = 2.0


def serve(orders: TextIO, answers: TextIO) -> None:
    """Runs launches until ``orders`` ends."""
    for line in iter(orders.readline, ""):
        order = Order(**json.loads(line))
        pids = [_fork(order, rank) for rank in range(len(order.environments))]
        codes: dict[int, int] = {}
        try:
            answer = _watch(pids, codes, order.timeout_s, orders.fileno())
        finally:
            for pid in pids:
                _kill(pid, ended=pid in codes)
        if answer is None:
            return
        answers.write(answer.to_json() + "\n")
        answers.flush()


def _fork(order: Order, rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = FAILED
    try:
        os.setsid()  # a group of its own, so that its data workers can be killed with it
        _redirect(f"{order.folder}/rank-{rank}.txt")
        os.environ.update(order.environments[rank])
        # A rank that is stuck says where, before it is killed.
        faulthandler.dump_traceback_later(order.timeout_s * 0.9, file=2)
        runner = importlib.import_module(order.runner)
        code = runner.run_script(order.setup, Path(order.folder), order.script, order.args)
    except BaseException:  # noqa: BLE001 -- a fork must end here, and never go on above
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(log: str) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(fd, target)


def _watch(
    pids: Sequence[int], codes: dict[int, int], timeout_s: float, orders: int
) -> Answer | None:
    """Waits for ranks to end, and takes their exit codes; None if nobody wants the answer."""
    deadline = time.monotonic() + timeout_s
    handles: Mapping[int, int] = {os.pidfd_open(pid): pid for pid in pids}
    poll = select.poll()
    poll.register(orders, select.POLLIN | select.POLLHUP)
    for handle in handles:
        poll.register(handle, select.POLLIN)
    try:
        while len(codes) < len(pids) and (left := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(left * 1000):
                if fd == orders:
                    return None  # nothing is ordered while a launch runs: it was closed
                poll.unregister(fd)
                pid = handles[fd]
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if codes[pid]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
    finally:
        for handle in handles:
            os.close(handle)
    failed = any(codes.values())
    late = len(codes) < len(pids) and not failed
    return Answer([codes.get(pid, -signal.SIGKILL) for pid in pids], late)


def _kill(pid: int, *, ended: bool) -> None:
    """Kills what a rank has started, and the rank itself unless it has ended."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it may not have had a group yet
        os.waitpid(pid, 0)


if __name__ == "__main__":
    assert torch._dynamo  # imported for those who are forked
    assert dtrain.callbacks
    # The answers' pipe is kept for itself: what anything prints here goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)
    os._exit(0)  # nothing is left to tidy up, and torch takes its time over it
