"""What one start of a script left behind: a line of JSON for each event, rank by rank.

A line is with the kernel once it is written, so a rank that is killed keeps all it had told.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: A report's kind, its step, and which of that kind at that step it was in this start.
ReportKey = tuple[str, int, int]


class Recorder:
    """Writes one rank's events to ``folder``.

    Args:
        folder: of this start.
        rank: whose.

    Ranks: all, local.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._file = os.open(_file(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(self, event: str, **values: Any) -> None:
        """Writes one event, in one piece."""
        os.write(self._file, (json.dumps({"event": event, **values}) + "\n").encode())


@dataclass(slots=True)
class RankRecord:
    """What one rank told in one start.

    Attributes:
        began_at: the step it went on from; None if it did not come that far.
        samples: for each step done, a digest of each sample the rank had, in order.
        reports: the figures of each report; rank 0's only.
        struck: the fault that was let loose here, in words; empty if none was.
        preempted: ``fit`` returned, and the run is to be continued.
        ended: ``fit`` returned.
        facts: what the script asked for: see :mod:`dtrain.trials.drill.probe`.
    """

    began_at: int | None = None
    samples: dict[int, list[str]] = field(default_factory=dict)
    reports: dict[ReportKey, dict[str, float]] = field(default_factory=dict)
    struck: str = ""
    preempted: bool = False
    ended: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, rank: int) -> RankRecord:
        """Reads what a :class:`Recorder` wrote; empty if it wrote nothing."""
        record = cls()
        file = _file(folder, rank)
        for line in file.read_text().splitlines() if file.exists() else ():
            record._take(json.loads(line))
        return record

    def _take(self, line: Mapping[str, Any]) -> None:
        event = line["event"]
        if event == "facts":
            self.facts = line["facts"]
        elif event == "began":
            self.began_at = line["step"]
        elif event == "step":
            self.samples[line["step"]] = line["samples"]
        elif event == "report":
            before = [k for k in self.reports if k[:2] == (line["kind"], line["step"])]
            self.reports[line["kind"], line["step"], len(before)] = line["values"]
        elif event == "struck":
            self.struck = line["what"]
        elif event == "ended":
            self.ended, self.preempted = True, line["preempted"]


@dataclass(frozen=True, slots=True)
class StartRecord:
    """What all ranks told in one start."""

    ranks: tuple[RankRecord, ...]

    @classmethod
    def read(cls, folder: Path, ranks: int) -> StartRecord:
        """Reads the records of so many ranks."""
        return cls(tuple(RankRecord.read(folder, rank) for rank in range(ranks)))

    @property
    def main(self) -> RankRecord:
        """Rank 0's."""
        return self.ranks[0]

    @property
    def struck(self) -> str:
        """The fault that was let loose, in words; empty if none was."""
        return next((rank.struck for rank in self.ranks if rank.struck), "")

    @property
    def finished(self) -> bool:
        """The training is done: no other start is needed."""
        return all(rank.ended and not rank.preempted for rank in self.ranks)

    @property
    def preempted(self) -> bool:
        """All ranks left in order, to be started again."""
        return all(rank.preempted for rank in self.ranks)

    def batches(self) -> dict[int, list[list[str]]]:
        """Returns for each step that all ranks have done, each rank's samples."""
        done = set.intersection(*({*rank.samples} for rank in self.ranks))
        return {step: [rank.samples[step] for rank in self.ranks] for step in sorted(done)}


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.jsonl"
