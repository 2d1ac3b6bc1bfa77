"""What follows from all heartbeats: pure functions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dtrain.distributed import Heartbeat, Process
from dtrain.errors import Failure, HangError, RankMismatch

#: Up to so many ranks, each looks at all others where it waits in vain; of more, so many do.
ALL_LOOK, LOOKERS = 64, 16

NAME_S = 5.0  # who has waited for so long says for whom, and what is known to be wrong is told
SILENT_S = 2.5  # a rank posts twice a second
STOPPED_S = 4.0  # a process may be stopped for a moment, and the ranks of a job in turn


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
    stopped_s: float = 0.0  # for how long it has been found stopped, by that clock


@dataclass(frozen=True, slots=True)
class Blame:
    """Which rank is to blame, and why."""

    heartbeat: Heartbeat  # its last post
    message: str  # what is wrong with it, in words
    table: str = ""  # where every rank is, if it takes all of them to understand
    kind: type[Exception] = HangError
    slow: bool = False  # nothing is known to be wrong: it takes too long
    held: bool = False  # its process runs, but cannot even post

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
            ends=True,
        )


def stuck(mine: Heartbeat, stopped: Sequence[int] = ()) -> Blame:
    """What a rank says of itself that works too long, or waits for processes ``stopped``."""
    words = f"it works without any progress for {mine.quiet_s:.1f} s"
    if stopped:
        return Blame(mine, f"{words}; its process {', '.join(map(str, stopped))} is stopped")
    return Blame(mine, f"{words}, where its limit is {mine.limit_s:.3g} s", slow=True)


def judge(seen: Sequence[Seen]) -> Blame | None:
    """Returns which of all ranks the others wait for in vain; None while any may still come.

    That is one whose process is known not to run; one that sits in a call that others have passed;
    and, as long as nothing of that kind is known, one that posts nothing for longer than its limit,
    or the odd one of ranks that all wait for longer than theirs.
    """
    for one in seen:
        if words := _not_running(one):
            return Blame(one.heartbeat, f"{words}; that is where it was heard of last")
    if alone := _diverged(seen):
        return alone
    inside = [one for one in seen if one.heartbeat.inside]
    mute = max(inside, key=lambda one: one.stale_s - one.heartbeat.limit_s, default=None)
    if mute and mute.stale_s > mute.heartbeat.limit_s:
        return Blame(
            mute.heartbeat,
            f"nothing was heard of it for {mute.stale_s:.1f} s, though its process is there: a "
            "call in C holds its interpreter, or it is stopped; that is where it was heard of last",
            slow=True,
            held=mute.process == "runs",
        )
    posts = [one.heartbeat for one in seen]
    if len(posts) < 2 or not all(p.inside and p.waits and p.quiet_s > p.limit_s for p in posts):
        return None
    return Blame(
        _odd(posts),
        "all ranks wait for one another, and none has moved for "
        f"{min(post.quiet_s for post in posts):.1f} s. They are in different calls (one of "
        "ctx.comm or torch.distributed that not every rank makes?), or the network is down. "
        "Where they are:",
        table(posts),
        RankMismatch,
        slow=True,
    )


def _not_running(one: Seen) -> str:
    """Says in words that a process does not run, if that is known."""
    if one.process == "gone":
        return "its process is gone"
    if one.process == "away":
        return f"nothing was heard of it for {one.stale_s:.1f} s, and its host does not answer"
    stopped = one.process == "stopped" and one.stopped_s >= STOPPED_S
    return "its process is stopped" if stopped else ""


def _diverged(seen: Sequence[Seen]) -> Blame | None:
    """Blames a rank that sits in a call which nobody else will come to any more."""
    posts = [one.heartbeat for one in seen]
    # Where ranks only just came to a call, what others know of them is on its way; and of a rank
    # that posts nothing, nobody knows where it is.
    if not all(p.inside and p.quiet_s > NAME_S for p in posts) or silent(seen):
        return None
    for call in {post.call: None for post in posts if post.call}:
        sitting = [post for post in posts if post.call == call]
        others = [post for post in posts if post.call != call]
        # Of many thousands of ranks, each is looked at once.
        known = all(post.order for post in sitting)
        last = max((post.step, post.order) for post in sitting)
        if others and all(
            post.call or (known and post.order and (post.step, post.order) > last)
            for post in others
        ):
            odd = _odd(posts)
            return Blame(
                odd if odd.call else sitting[0],
                "all ranks wait for one another, for they are in different calls (one of ctx.comm "
                "or torch.distributed that not every rank makes?): whoever waits here waits for "
                "ranks that have gone on. Where they are:",
                table(posts),
                RankMismatch,
            )
    return None


def silent(seen: Sequence[Seen]) -> Seen | None:
    """Returns the rank in ``fit`` that has posted nothing for longest, if that is long."""
    inside = [one for one in seen if one.heartbeat.inside and one.stale_s > SILENT_S]
    return max(inside, key=lambda one: one.stale_s, default=None)


def _odd(posts: Sequence[Heartbeat]) -> Heartbeat:
    """Returns which rank is elsewhere than most; of several, the one furthest behind."""
    alike = Counter(post.where for post in posts)
    return min(posts, key=lambda post: (alike[post.where], post.step, post.order, post.rank))


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
