"""What the main thread learns from the other ranks' posts: who is lost, and where they wait."""

import threading

from dtrain.distributed import Phase, World
from dtrain.errors import Failure
from dtrain.watchdog.judgement import ALL_LOOK, SILENT_S, judge
from dtrain.watchdog.store import TICK_S, Others, WatchdogStore

_LOOK_S = 0.05
_GRACE_S = 3.0  # for others to find out
_LOST = Phase("finding out which rank was lost", slow=True)
#: A failure is to be told; see :func:`are_in_a_verb`.
_TELLING = Phase("finding out where the others wait", waits=True, slow=True)
_MEETING = "comm 'gathers of a loss function'"  # to which a rank that failed comes as well


def find_lost(told: WatchdogStore, world: World) -> Failure | None:
    """Returns the failure that broke a connection.

    It waits until all other ranks have posted anew, so that none of them is to blame, or until
    one is known to be gone. In a large world only the first who come look; the others wait for
    what those find, and look only if that is nothing.
    """
    if told.store is None or told.lost:
        return None
    others = Others(world.size)
    began = told.clock.now()
    first: dict[int, int] = {}
    is_early = world.size <= ALL_LOOK or told.is_among_the_first()
    from_s = 0.0 if is_early else _GRACE_S + 2 * TICK_S
    while (now := told.clock.now()) - began < from_s + _GRACE_S + TICK_S:
        world.comm.activity.enter(_LOST)
        failure = told.new_failure()
        if failure is not None:
            return failure if failure.rank != world.rank else None
        if now - began < from_s:
            _pause(TICK_S)
            continue
        seen = told.look(others, now, silent_s=SILENT_S)
        seen = [one for one in seen if one.heartbeat.rank != world.rank]
        if told.lost:
            return None
        blame = judge(seen)
        if blame is not None:
            return told.record(blame.failure())
        posts = [one.heartbeat for one in seen]
        first = first or {post.rank: post.number for post in posts}
        if all(post.inside and post.number > first[post.rank] for post in posts):
            return None
        # Of 16,384 ranks, once a second: three looks until the silent one is known.
        _pause(max(TICK_S / 2, world.size / 16384))
    return None


def are_in_a_verb(told: WatchdogStore, world: World) -> bool:
    """Says whether the others wait for this rank in a verb, or in a reduction.

    For a rank that failed beside a reduction. It returns as soon as that is known of one of them
    (of many, the next ones are looked at): they all make the same calls.
    """
    activity = world.comm.activity
    before = activity.enter(_TELLING)
    near = [(world.rank + 1 + place) % world.size for place in range(min(world.size - 1, ALL_LOOK))]
    first: dict[int, int] = {}
    try:
        while told.store is not None and not told.lost:
            failure = told.new_failure()
            if failure is not None and failure.ends:
                return False
            posts = told.read(near)
            first = first or {post.rank: post.number for post in posts}
            # Such as have stood there since this rank failed: what they wait for is this one.
            still = [p for p in posts if p.number > first[p.rank] + 1 and p.quiet_s > 0]
            if any(post.call == "verb" and post.phase != _MEETING for post in still):
                return True
            if any(post.waits and post.phase != _TELLING.name for post in still):
                return False
            if len(still) == len(posts) and all(post.phase == _TELLING.name for post in still):
                return False  # all have failed
            if any(not post.inside for post in posts):
                return False
            _pause(_LOOK_S)
        return False
    finally:
        activity.enter(before)


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)
