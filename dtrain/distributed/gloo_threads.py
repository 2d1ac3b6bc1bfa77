"""Threads of gloo's that let one another finish: on busy cores, half of a small step's time."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def yielding_threads() -> Iterator[None]:
    """Threads that are started in the block wait for a core, and push no other thread off one.

    A message wakes the thread of gloo's that reads the socket. If that one is put where the thread
    runs that began the exchange, and pushes it aside while it holds their lock, then it asks for
    the lock again and again until its time is over: 4 ms with a kernel that ticks at 250 Hz, ten
    times what the reduction takes (benchmarks/gloo_threads.py). Linux has a policy for threads
    that do not push: ``SCHED_BATCH``. It costs nothing where there are cores to spare.

    Ranks: all, local.
    """
    if sys.platform != "linux":
        yield
        return
    chosen = False
    # Where a container forbids it, or does not know it, they work as ever, only slower.
    with suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            chosen = True
    try:
        yield
    finally:
        if chosen:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
