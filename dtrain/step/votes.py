"""From what one rank requests to what all ranks do."""

from dataclasses import dataclass, field

import torch

from dtrain.context import Request
from dtrain.distributed import Comm
from dtrain.step.lane import Lane, Slot

Reasons = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Agreed:
    """What all ranks do. Equal on all of them."""

    save: bool = False  # make a checkpoint
    preempt: bool = False  # save and leave; the run is to be continued
    stop_reason: str = ""  # why to stop, or nothing


@dataclass
class Agreement:
    """Carries requests to all ranks: in the lane during a step, in a verb between steps.

    Only counts travel in the lane. Reasons are gathered as text once somebody asked.
    """

    request: Request
    comm: Comm
    host: str
    #: What this rank has failed by, and where; until all ranks learn of it.
    trouble: tuple[Exception, str] | None = None
    _carried: Reasons = field(default_factory=dict)

    def say(self, lane: Lane) -> None:
        """Puts what is pending into the lane, for the reduction that comes next."""
        pending = self.request.pending
        if pending["stop"] or pending["save"] or pending["preempt"]:
            for kind, reasons in self._take().items():
                # Those of a step that was not waited for may still be there.
                self._carried.setdefault(kind, []).extend(reasons)
                lane.say(Slot[kind.upper()], int(bool(reasons)))

    def drop(self) -> None:
        """Forgets what was requested and not agreed, as after a failure."""
        self._take()
        self.request.skipped.clear()
        self._carried = {}

    def carried(self) -> Agreed:
        """Returns what votes in the lane amount to, if there were any. Ranks: all, communicates."""
        mine, self._carried = self._carried, {}
        return self._gather(mine)

    @property
    def asked(self) -> int:
        """How many requests of this rank are pending. Local."""
        return sum(map(len, self.request.pending.values()))

    def settle(self) -> Agreed:
        """Returns what was requested since the last reduction. Ranks: all, communicates."""
        if not int(self.comm.all_reduce("requests", torch.tensor(self.asked))):
            return Agreed()
        return self._gather(self._take())

    def _take(self) -> Reasons:
        # One by one: a signal may add another at any moment, and none may be lost.
        pending = self.request.pending.items()
        return {kind: [reasons.pop(0) for _ in range(len(reasons))] for kind, reasons in pending}

    def _gather(self, mine: Reasons) -> Agreed:
        by_rank = self.comm.gather_objects("reasons", (self.host, mine))
        preempt, stop = _words(by_rank, "preempt"), _words(by_rank, "stop")
        return Agreed(
            save=any(reasons.get("save") for _, reasons in by_rank),
            preempt=bool(preempt),
            stop_reason=preempt or stop,
        )


def _words(by_rank: list[tuple[str, Reasons]], kind: str) -> str:
    """Who asked, and why; once, where all ranks asked for the same reason."""
    asked = [reasons.get(kind, []) for _, reasons in by_rank]
    if asked[0] and all(reasons == asked[0] for reasons in asked):
        return "; ".join(asked[0])
    return "; ".join(
        f"{why} (asked by rank {rank} on {host})"
        for rank, (host, reasons) in enumerate(by_rank)
        for why in reasons.get(kind, [])
    )
