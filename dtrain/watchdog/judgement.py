"""What follows from all heartbeats: pure functions."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dtrain.distributed import Heartbeat, Process
from dtrain.errors import Failure, HangError, RankMismatch

#: Up to so many ranks, each looks at all others where it waits in vain; of more, so many do.
ALL_LOOK, LOOKERS = 64, 16


class Turn(NamedTuple):
    """When a rank looks at the others."""

    after_s: float  # how much longer it waits before it looks
    every_s: float  # how long it waits before it looks again


@dataclass(frozen=True, slots=True)
class Seen:
    """A rank, as another one sees it."""

    heartbeat: Heartbeat  # its last post
    stale_s: float = 0.0  # for how long it has posted nothing new, by the watching rank's clock
    process: Process = "unknown"  # what its host's kernel says of it, where that can be asked


@dataclass(frozen=True, slots=True)
class Blame:
    """Which rank is to blame, and why."""

    heartbeat: Heartbeat  # its last post
    message: str  # what is wrong with it, in words
    table: str = ""  # where every rank is, if it takes all of them to understand
    kind: type[Exception] = HangError

    def failure(self) -> Failure:
        """What the ranks leave in the store for one another."""
        return Failure(
            rank=self.heartbeat.rank,
            host=self.heartbeat.host,
            where=self.heartbeat.phase or "an unknown phase",
            step=self.heartbeat.step,
            kind=self.kind.__name__,
            message=self.message + (f"\n{self.table}\n" if self.table else ""),
            location=self.heartbeat.at or "line unknown",
        )


def stuck(mine: Heartbeat, stopped: Sequence[int] = ()) -> Blame:
    """What a rank says of itself that works too long; for processes ``stopped``, it may wait."""
    workers = f"; its process {', '.join(map(str, stopped))} is stopped" if stopped else ""
    return Blame(
        mine,
        f"it works without any progress for {mine.quiet_s:.1f} s, where its limit is "
        f"{mine.limit_s:.3g} s{workers}",
    )


def judge(seen: Sequence[Seen], *, silent_s: float = math.inf) -> Blame | None:
    """Returns which of all ranks the others wait for in vain; None while any may still come.

    A rank that works is judged by itself; one that waits judges the others, and blames one whose
    process is stopped or gone, one that posts nothing for longer than ``silent_s`` (or its own
    limit), or, where all wait for one another, the one that is elsewhere.
    """
    for process, words in (("gone", "its process is gone"), ("stopped", "its process is stopped")):
        for one in seen:
            if one.process == process:
                return Blame(one.heartbeat, f"{words}; that is where it was heard of last")
    inside = [one for one in seen if one.heartbeat.inside]
    silent = max(inside, key=lambda one: one.stale_s, default=None)
    if silent and silent.stale_s > min(silent_s, silent.heartbeat.limit_s):
        return Blame(
            silent.heartbeat,
            f"nothing was heard of it for {silent.stale_s:.1f} s: it is stopped, its host is "
            "gone, or a call holds the interpreter; that is where it was heard of last",
        )
    posts = [one.heartbeat for one in seen]
    if len(posts) < 2 or not all(p.inside and p.waits and p.quiet_s > p.limit_s for p in posts):
        return None
    alike = Counter(post.where for post in posts)
    return Blame(
        min(posts, key=lambda post: (alike[post.where], post.step, post.rank)),
        "all ranks wait for one another, and none has moved for "
        f"{min(post.quiet_s for post in posts):.1f} s. They are in different calls (one of "
        "ctx.comm or torch.distributed that not every rank makes?), or the network is down. "
        "Where they are:",
        table(posts),
        RankMismatch,
    )


def table(heartbeats: Sequence[Heartbeat]) -> str:
    """Where every rank is; those that are in the same place in one line."""
    groups: dict[str, list[Heartbeat]] = {}
    for heartbeat in heartbeats:
        groups.setdefault(heartbeat.where, []).append(heartbeat)
    return "\n".join(f"  {_ranks(group)}: {where}" for where, group in groups.items())


def _ranks(heartbeats: Sequence[Heartbeat]) -> str:
    names = ", ".join(str(heartbeat.rank) for heartbeat in heartbeats[:8])
    more = f" and {len(heartbeats) - 8} more" if len(heartbeats) > 8 else ""
    hosts = sorted({heartbeat.host for heartbeat in heartbeats})
    on = ", ".join(hosts[:3]) + (" and others" if len(hosts) > 3 else "")
    return f"{'ranks' if len(heartbeats) > 1 else 'rank'} {names}{more} on {on}"


def behind(seen: Sequence[Seen]) -> Heartbeat | None:
    """Returns the rank that the others wait for, if they do not wait for one another."""
    posts = [one.heartbeat for one in seen]
    working = [one for one in posts if not (one.inside and one.waits)]
    return min(working, key=lambda one: (one.inside, one.step, -one.quiet_s), default=None)


def gives_way(mine: Heartbeat, seen: Sequence[Seen]) -> bool:
    """Says whether ``mine``, which is too quiet, may be only because of a rank further behind.

    On CUDA a rank that seems to work may wait in a kernel for another rank.
    """
    return any(
        one.heartbeat.inside
        and one.heartbeat.rank != mine.rank
        and one.heartbeat.step < mine.step
        and one.heartbeat.quiet_s + one.stale_s > mine.quiet_s / 2
        for one in seen
    )


def looks(rank: int, size: int) -> Turn:
    """Says when a rank that waits in vain looks at all others, so that one store bears it.

    Up to 64 ranks all do, about once a second. Of 16,384 that would be minutes of its work: so few
    do, far from each other, and the others read what those find out, or join one by one.
    """
    if size <= ALL_LOOK:
        return Turn(0.0, size / 64)
    if rank % -(-size // LOOKERS) == 0:
        return Turn(0.0, size / 8192)
    return Turn(float(rank), size / 64)
