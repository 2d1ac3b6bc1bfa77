"""What became of each rank of a test."""

from dataclasses import dataclass
from typing import Any

from dtrain.errors import DtrainError

_TAIL = 30  # lines of a failed rank's output that are shown


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one rank."""

    rank: int
    value: Any  # what the function returned, if it did
    error: BaseException | None  # what it raised, or why it ended otherwise (killed, out of time)
    trace: str  # the traceback as text, where it raised
    output: str = ""  # to stdout and stderr; nothing for a thread, which writes where the test does
    exitcode: int | None = None  # of the process; negative for a signal, None for a thread


class RanksFailed(DtrainError, AssertionError):
    """Some rank raised, died, or did not come back in time; ``outcomes`` has every rank's."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes
        parts = []
        for outcome in outcomes:
            what = "fine"
            if outcome.error is not None:
                what = outcome.trace or f"{outcome.error}\n"
                what += "".join(f"  | {line}\n" for line in outcome.output.splitlines()[-_TAIL:])
            parts.append(f"rank {outcome.rank}: {what}")
        super().__init__("\n".join(parts))


def values_of(outcomes: list[Outcome]) -> list[Any]:
    """Returns what each rank returned, by rank; raises RanksFailed if one did not."""
    if any(outcome.error is not None for outcome in outcomes):
        raise RanksFailed(outcomes)
    return [outcome.value for outcome in outcomes]
