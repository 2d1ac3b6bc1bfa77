"""Where the order of sharded modules is not known yet: ranks tell it to one another as they go.

In the first micro-step, and in an evaluation in which not all ranks have a batch, a rank says which
module it gathers next, before it does. So one without a batch, or one that has failed, can follow:
it gathers what the others gather. In the end it knows the order, and needs not be told any more.
"""

from collections.abc import Mapping

import torch
from torch.distributed.fsdp import FSDPModule

from dtrain.distributed import Comm
from dtrain.errors import RankMismatch
from dtrain.step import MicroStep
from dtrain.strategies.tape import Node, Tape

_DONE, _FOLLOWS = -1, -2  # what a rank says that gathers nothing
_LABEL = "which sharded module comes next"


class Following:
    """What ranks say of the order.

    Args:
        parts: the sharded modules by name, equal on all ranks; the root's is empty.
        tape: what they gather.
        comm: how ranks tell one another.

    Ranks: all.
    """

    def __init__(self, parts: Mapping[str, FSDPModule], tape: Tape, comm: Comm) -> None:
        self._parts, self._tape, self._comm = parts, tape, comm
        self._names = [name for name in parts if name]
        self._places = {name: place for place, name in enumerate(self._names)}
        self._parted: RankMismatch | None = None

    def begin(self) -> None:
        """From here on this rank tells what it gathers; local."""
        self._tape.announce = self._announce

    def check(self) -> None:
        """Raises RankMismatch where ranks came to different modules, which all know; local."""
        if self._parted is not None:
            parted, self._parted = self._parted, None
            raise parted

    def _announce(self, name: str) -> None:
        if name:  # to the root's all come
            self._compare(self._places[name])

    def _compare(self, mine: int) -> int:
        """Returns what all gather next; negative where nobody gathers. Communicates."""
        if self._parted is not None:
            raise self._parted  # all ranks know it, and none waits
        said = self._comm.all_gather(_LABEL, torch.tensor(mine)).tolist()
        runs = {one for one in said if one != _FOLLOWS}
        if len(runs) > 1:
            words = [
                f"rank {rank}: {self._names[one] if one >= 0 else 'the end of its forward'}"
                for rank, one in enumerate(said)
                if one != _FOLLOWS
            ]
            self._parted = RankMismatch(
                "ranks came to different sharded modules, and would compute with each other's "
                f"weights ({'; '.join(words)}). Run the same ones, in the same order, on all ranks"
            )
            raise self._parted
        return int(next(iter(runs), _DONE))

    def follow(self, plan: Node | None, micro_step: MicroStep) -> Node | None:
        """Gathers what others do whose forward is not over; returns the order, if any rank has one.

        ``plan`` is this rank's own, if its forward came to its end. Communicates.
        """
        self._tape.announce = None
        try:
            while (place := self._compare(_FOLLOWS if plan is None else _DONE)) >= 0:
                self._parts[self._names[place]].unshard()
                self._parts[self._names[place]].reshard()
            plans = self._comm.gather_objects("the order of the sharded modules", plan)
        except RankMismatch as mismatch:
            # Others may be in a verb of their loss functions, which this rank's has not come to.
            if (trouble := micro_step.agreement.trouble) is not None:
                raise trouble[0] from mismatch
            raise
        return plan or next((one for one in plans if one is not None), None)
