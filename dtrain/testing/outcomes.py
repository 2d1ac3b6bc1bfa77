"""What became of each rank of a test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dtrain.errors import DtrainError


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one rank.

    Attributes:
        rank: which.
        value: what the function returned, if it did.
        error: what it raised, or why it ended without either (killed, out of time).
        trace: the traceback as text, where it raised.
        output: what it wrote to stdout and stderr; nothing for a thread, which writes where the
            test does.
        exitcode: of the process; negative for a signal, None for a thread.
    """

    rank: int
    value: Any
    error: BaseException | None
    trace: str
    output: str = ""
    exitcode: int | None = None


class RanksFailed(DtrainError, AssertionError):
    """Some rank raised, died, or did not come back in time.

    Attributes:
        outcomes: every rank's, by rank.
    """

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes
        parts = []
        for outcome in outcomes:
            what = "fine"
            if outcome.error is not None:
                what = (outcome.trace or f"{outcome.error}\n") + _tail(outcome.output)
            parts.append(f"rank {outcome.rank}: {what}")
        super().__init__("\n".join(parts))


def values_of(outcomes: list[Outcome]) -> list[Any]:
    """Returns what each rank returned, by rank.

    Raises:
        RanksFailed: some rank did not return.
    """
    if any(outcome.error is not None for outcome in outcomes):
        raise RanksFailed(outcomes)
    return [outcome.value for outcome in outcomes]


def _tail(output: str, lines: int = 30) -> str:
    kept = output.splitlines()[-lines:]
    return "".join(f"  | {line}\n" for line in kept)
