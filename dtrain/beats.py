"""What ranks post of themselves, and what follows from all of it: a pure function.

A rank that works is judged by itself. A rank that waits judges the others, and only where
waiting is in vain: for one whose process is stopped or gone, for one that posts nothing any
more, or because all wait for one another.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from dtrain.errors import Failure, HangError, RankMismatch

Process = Literal["runs", "stopped", "gone", "unknown"]


@dataclass(frozen=True, slots=True)
class Beat:
    """What one rank posts of itself.

    Attributes:
        rank: which.
        host: its host's name.
        pid: of its process.
        machine: equal where process numbers mean the same; nothing where that is not known.
        number: grows from post to post.
        step: the global step it is in.
        phase: where its main thread is: a hook, or a phase of the loop.
        at: ``file:line`` of that, once it has stayed there for a moment.
        waits: whether it waits for other ranks there.
        quiet_s: for how long it has made no progress.
        limit_s: how long that may be where it is.
        inside: in ``fit`` or ``evaluate``; elsewhere nobody posts.
    """

    rank: int
    host: str
    pid: int
    machine: str
    number: int
    step: int = 0
    phase: str = ""
    at: str = ""
    waits: bool = False
    quiet_s: float = 0.0
    limit_s: float = 0.0
    inside: bool = False

    def to_json(self) -> str:
        """Returns what :meth:`from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Beat:
        """Reads what :meth:`to_json` returned."""
        return cls(**json.loads(text))

    @property
    def who(self) -> str:
        """Rank, host and process, in words."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    @property
    def where(self) -> str:
        """Step, phase and line, in words."""
        if not self.inside:
            return "outside of fit"
        return f"step {self.step} in {self.phase}" + (f" ({self.at})" if self.at else "")


#: Up to so many ranks, each looks at all others where it waits in vain; of more, so many do.
ALL_LOOK, LOOKERS = 64, 16


class Turn(NamedTuple):
    """When a rank looks at the others.

    Attributes:
        after_s: how much longer it waits before it looks.
        every_s: how long it waits before it looks again.
    """

    after_s: float
    every_s: float


@dataclass(frozen=True, slots=True)
class Seen:
    """A rank, as another one sees it.

    Attributes:
        beat: its last post.
        stale_s: for how long, by the watching rank's clock, it has posted nothing new.
        process: what its host's kernel says of its process, where that can be asked.
    """

    beat: Beat
    stale_s: float = 0.0
    process: Process = "unknown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which rank is to blame, and why.

    Attributes:
        beat: its last post.
        message: what is wrong with it, in words.
        table: where every rank is, if it takes all of them to understand.
        kind: what kind of error it is.
    """

    beat: Beat
    message: str
    table: str = ""
    kind: type[Exception] = HangError

    def failure(self) -> Failure:
        """What the ranks leave in the store for one another."""
        return Failure(
            rank=self.beat.rank,
            host=self.beat.host,
            where=self.beat.phase or "an unknown phase",
            step=self.beat.step,
            kind=self.kind.__name__,
            message=self.message + (f"\n{self.table}\n" if self.table else ""),
            location=self.beat.at or "line unknown",
        )


def stuck(mine: Beat, stopped: Sequence[int] = ()) -> Verdict:
    """The verdict of a rank on itself.

    Args:
        mine: its last post.
        stopped: processes of its own that are stopped; it may be waiting for them.
    """
    workers = f"; its process {', '.join(map(str, stopped))} is stopped" if stopped else ""
    return Verdict(
        mine,
        f"it works without any progress for {mine.quiet_s:.1f} s, where its limit is "
        f"{mine.limit_s:.3g} s{workers}",
    )


def judge(seen: Sequence[Seen], *, silent_s: float | None = None) -> Verdict | None:
    """Returns which rank the others wait for in vain; None while any may still come.

    Args:
        seen: all ranks, the judging one included, as that one sees them.
        silent_s: how long a rank may post nothing; its own limit where None.
    """
    for process, words in (("gone", "its process is gone"), ("stopped", "its process is stopped")):
        for one in seen:
            if one.process == process:
                return Verdict(one.beat, f"{words}; that is where it was heard of last")
    inside = [one for one in seen if one.beat.inside]
    silent = max(inside, key=lambda one: one.stale_s, default=None)
    if silent is not None:
        may = silent.beat.limit_s if silent_s is None else min(silent_s, silent.beat.limit_s)
        if silent.stale_s > may:
            return Verdict(
                silent.beat,
                f"nothing was heard of it for {silent.stale_s:.1f} s: it is stopped, its host is "
                "gone, or a call holds the interpreter; that is where it was heard of last",
            )
    in_vain = [one for one in inside if one.beat.waits and one.beat.quiet_s > one.beat.limit_s]
    if len(seen) > 1 and len(in_vain) == len(seen):
        return _diverged([one.beat for one in in_vain])
    return None


def _diverged(beats: Sequence[Beat]) -> Verdict:
    alike = Counter((beat.step, beat.phase, beat.at) for beat in beats)
    odd = min(beats, key=lambda beat: (alike[beat.step, beat.phase, beat.at], beat.step, beat.rank))
    return Verdict(
        odd,
        f"all ranks wait for one another, and none has moved for "
        f"{min(beat.quiet_s for beat in beats):.1f} s. They are in different calls (one of "
        "ctx.comm or torch.distributed that not every rank makes?), or the network is down. "
        "Where they are:",
        table(beats),
        RankMismatch,
    )


def table(beats: Sequence[Beat]) -> str:
    """Where every rank is; those that are in the same place in one line."""
    groups: dict[str, list[Beat]] = {}
    for beat in beats:
        groups.setdefault(beat.where, []).append(beat)
    return "\n".join(f"  {_ranks(group)}: {where}" for where, group in groups.items())


def _ranks(beats: Sequence[Beat], most: int = 8) -> str:
    names = ", ".join(str(beat.rank) for beat in beats[:most])
    more = f" and {len(beats) - most} more" if len(beats) > most else ""
    hosts = sorted({beat.host for beat in beats})
    on = ", ".join(hosts[:3]) + (" and others" if len(hosts) > 3 else "")
    return f"{'ranks' if len(beats) > 1 else 'rank'} {names}{more} on {on}"


def behind(seen: Sequence[Seen]) -> Beat | None:
    """Returns the rank that the others wait for, if they do not wait for one another."""
    working = [one.beat for one in seen if not (one.beat.inside and one.beat.waits)]
    return min(working, key=lambda beat: (beat.inside, beat.step, -beat.quiet_s), default=None)


def gives_way(mine: Beat, seen: Sequence[Seen]) -> bool:
    """Says whether ``mine``, which is too quiet, may be only because of a rank further behind.

    On CUDA a rank that seems to work may wait in a kernel for another rank.
    """
    return any(
        one.beat.inside
        and one.beat.rank != mine.rank
        and one.beat.step < mine.step
        and one.beat.quiet_s + one.stale_s > mine.quiet_s / 2
        for one in seen
    )


def looks(rank: int, size: int) -> Turn:
    """Says when a rank that waits in vain looks at all others, so that one store bears it.

    Up to 64 ranks all do, about once a second. Were it all of 16,384, each would ask for as many
    posts: minutes of work for the store. So :data:`LOOKERS` ranks do, far from each other, and the
    others read what those find out; should all of them be lost, the others join, one a second.
    """
    if size <= ALL_LOOK:
        return Turn(0.0, size / 64)
    if rank % -(-size // LOOKERS) == 0:
        return Turn(0.0, size / 8192)
    return Turn(float(rank), size / 64)


def beat_key(rank: int) -> str:
    """Where in the store a rank posts."""
    return f"beat/{rank}"


def this_machine() -> str:
    """Names the space of process numbers that this process is in; nothing where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def look_up(beat: Beat, machine: str) -> Process:
    """Asks the kernel about a rank's process, if it runs on this ``machine``."""
    if not machine or beat.machine != machine:
        return "unknown"
    return _process(beat.pid)


def stopped_children(of: int | None = None) -> list[int]:
    """Returns which processes that this one has started are stopped, as loaders' workers may be.

    Their own children are among them: workers may come from a server that forks. Empty where the
    kernel does not tell.
    """
    of = of or os.getpid()
    try:
        children = Path(f"/proc/{of}/task/{of}/children").read_text().split()
    except OSError:
        return []
    stopped = []
    for pid in map(int, children):
        stopped += [pid] * (_process(pid) == "stopped") + stopped_children(pid)
    return stopped


def _process(pid: int) -> Process:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return "gone"
    except OSError:
        return "unknown"
    state = stat[stat.rindex(")") + 2]
    if state in "ZXx":
        return "gone"
    return "stopped" if state == "T" else "runs"  # "t": in a debugger; that is no fault
