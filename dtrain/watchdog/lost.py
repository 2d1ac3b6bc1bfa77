"""Which rank broke a connection; asked by the main thread, once it found one broken."""

import threading
import time

from dtrain.distributed import Phase, World
from dtrain.errors import Failure
from dtrain.watchdog.bounded import TICK_S
from dtrain.watchdog.judgement import ALL_LOOK, Seen, judge
from dtrain.watchdog.store import Others, WatchdogStore

GRACE_S = 3.0  # for the main thread to raise what the watchdog has found
_FINDING_OUT = Phase("finding out which rank was lost", slow=True)
_SILENT_S = 2.5  # once connections have broken, a rank that posts nothing this long is the cause


def find_lost(told: WatchdogStore, world: World, ended: threading.Event) -> Failure | None:
    """Returns the failure that broke a connection.

    It waits until all other ranks have posted anew, so that none of them is to blame, or until one
    has not for too long. In a large world only the first who come look; the others wait for what
    those find, and look only if that is nothing. Nobody waits for the answer once it has ``ended``.

    Ranks: all, local.
    """
    if told.store is None or told.lost:
        return None
    others = Others(told.store, world.size)
    began = time.monotonic()
    first: dict[int, int] = {}
    is_early = world.size <= ALL_LOOK or told.is_among_the_first()
    from_s = 0.0 if is_early else GRACE_S + 2 * TICK_S
    while (now := time.monotonic()) - began < from_s + GRACE_S + TICK_S:
        world.comm.activity.enter(_FINDING_OUT)
        failure = told.new_failure()
        if failure is not None:
            return failure if failure.rank != world.rank else None
        if now - began < from_s:
            ended.wait(TICK_S)
            continue
        seen = [one for one in told.look(others, now) if one.heartbeat.rank != world.rank]
        if told.lost:
            return None
        blame = judge(seen, silent_s=_SILENT_S)
        if blame is not None:
            return told.record(blame.failure())
        first = first or {one.heartbeat.rank: one.heartbeat.number for one in seen}
        if all(_has_posted_since(first, one) for one in seen):
            return None
        # Of 16,384 ranks, once a second: three looks until the silent one is known.
        ended.wait(max(TICK_S / 2, world.size / 16384))
    return None


def _has_posted_since(first: dict[int, int], one: Seen) -> bool:
    heartbeat = one.heartbeat
    return heartbeat.inside and heartbeat.number > first[heartbeat.rank]
