"""What one rank's failure means to the others, and the record of it that they find in the store."""

import json
import re
from dataclasses import asdict

from torch.distributed import Store  # type: ignore[attr-defined]

from dtrain.distributed.activity import Phase
from dtrain.errors import CommError, DtrainError, Failure, RankMismatch, RemoteError

# What torch says where the other end of a connection is gone; it has no type for that.
_BROKEN = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset)|Broken pipe")


class Failures:
    """This rank's failures, and those that the others have recorded.

    Ranks: all, local.
    """

    def __init__(self, rank: int, host: str, store: Store | None) -> None:
        self.rank = rank
        self.host = host
        self.step = 0  # the global step that this rank is at
        self.told: BaseException | None = None  # the last error that all ranks know of
        self.store = store  # where failures are recorded; nowhere where None

    def describe(self, error: BaseException, where: str) -> Failure:
        """Says in words that can be sent what went wrong on this rank."""
        return Failure.of(error, rank=self.rank, host=self.host, where=where, step=self.step)

    def is_told(self, error: BaseException) -> bool:
        """Says whether all ranks know of ``error``, or of what it was made from."""
        known: BaseException | None = error
        while known is not None:
            if known is self.told or isinstance(known, RemoteError | RankMismatch | CommError):
                return True
            known = known.__cause__
        return False

    def record(self, error: BaseException, where: str) -> None:
        """Leaves this rank's failure in the store, unless all know of it."""
        if self.store is None or self.is_told(error):
            return
        text = json.dumps(asdict(self.describe(error, where)))
        try:
            # compare_set: the first writer wins, so the root cause is kept.
            self.store.compare_set("failure", "", text)
        except RuntimeError as unreachable:
            error.add_note(f"(could not be recorded for the other ranks: {unreachable})")

    def forget(self) -> None:
        """Removes the record: all ranks know, and a later failure must not be taken for it."""
        if self.store is not None:
            self.store.delete_key("failure")

    def explain(self, error: BaseException) -> DtrainError | None:
        """Returns another rank's recorded failure, if that is why ``error`` happened."""
        if self.store is None or isinstance(error, DtrainError):
            return None
        try:
            text = self.store.get("failure") if self.store.check(["failure"]) else b""
        except RuntimeError:
            return None  # the store went away with its host: nothing better than `error` is known
        failure = Failure(**json.loads(text)) if text else None
        return None if failure is None or failure.rank == self.rank else RemoteError(str(failure))


def may_be_broken(error: BaseException, phase: Phase) -> bool:
    """Says whether ``error``, raised in ``phase``, may only mean that another rank is gone.

    Ranks: all, local.
    """
    if isinstance(error, DtrainError) or not isinstance(error, RuntimeError):
        return isinstance(error, CommError)
    return phase.waits or _BROKEN.search(str(error)) is not None
