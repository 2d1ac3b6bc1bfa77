"""What a drilled training leaves behind: what each rank told in each start, and its last state."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dtrain.checkpoint import find_checkpoint, load_state, load_tensors
from dtrain.errors import CheckError
from dtrain.trials.records import events

#: A report's kind, its step, and which of that kind at that step it was in this start.
ReportKey = tuple[str, int, int]

#: Of a checkpoint's state: what a resumed run must end with, as one that was left alone.
_KEPT = ("progress", "optimizer", "precision", "callbacks", "shared_rng")


@dataclass(slots=True)
class RankRecord:
    """What one rank told in one start."""

    began_at: int | None = None  # the step it went on from; None if it did not come that far
    #: For each step done, a digest of each sample the rank had, in order.
    samples: dict[int, list[str]] = field(default_factory=dict)
    #: The figures of each report; rank 0's only.
    reports: dict[ReportKey, dict[str, float]] = field(default_factory=dict)
    disturbed: str = ""  # what befell it here, in words
    preempted: bool = False  # fit returned, and the run is to be continued
    ended: bool = False  # fit returned
    #: What the script asked for: run_dir, checkpoint, stream, never_resumes.
    facts: dict[str, bool] = field(default_factory=dict)

    def take(self, event: Mapping[str, Any]) -> None:
        """Takes one event that it told."""
        match event:
            case {"event": "facts", "facts": facts}:
                self.facts |= facts
            case {"event": "began", "step": step}:
                self.began_at = step
            case {"event": "step", "step": step, "samples": samples}:
                self.samples[step] = samples
            case {"event": "report", "kind": kind, "step": step, "values": values}:
                before = [key for key in self.reports if key[:2] == (kind, step)]
                self.reports[kind, step, len(before)] = values
            case {"event": "disturbed", "what": what}:
                self.disturbed = what
            case {"event": "ended", "preempted": preempted}:
                self.ended, self.preempted = True, preempted


@dataclass(frozen=True, slots=True)
class StartRecord:
    """What all ranks told in one start."""

    ranks: tuple[RankRecord, ...]

    @classmethod
    def read(cls, folder: Path, ranks: int) -> "StartRecord":
        """Reads the records of so many ranks."""
        records = tuple(RankRecord() for _ in range(ranks))
        for rank, record in enumerate(records):
            for event in events(folder, rank):
                record.take(event)
        return cls(records)

    @property
    def main(self) -> RankRecord:
        """Rank 0's."""
        return self.ranks[0]

    @property
    def disturbed(self) -> str:
        """What befell it, in words; empty if nothing did."""
        return next((rank.disturbed for rank in self.ranks if rank.disturbed), "")

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


@dataclass(frozen=True, slots=True)
class LastCheckpoint:
    """What a run's newest checkpoint holds."""

    step: int  # after which it was made
    model: dict[str, Tensor]  # parameters and buffers
    state: dict[str, Any]  # the rest, flat: from optimizer/state/0/exp_avg, say, to its value

    @classmethod
    def read(cls, run_dir: Path) -> "LastCheckpoint":
        """Reads the newest intact checkpoint of a run; raises CheckError if there is none."""
        saved, damage = find_checkpoint(run_dir / "checkpoints")
        if saved is None:
            raise CheckError(
                "the training came to its end and left no intact checkpoint"
                + "".join(f"; {what}" for what in damage)
            )
        state = load_state(saved.path)
        kept = {name: state[name] for name in _KEPT}
        return cls(saved.step, load_tensors(saved.path), dict(_leaves(kept, "")))


@dataclass(frozen=True, slots=True)
class DrilledRun:
    """One training, from its first start to its end."""

    starts: tuple[StartRecord, ...]  # all but the last ended early
    final: LastCheckpoint


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(below, f"{path}/{key}" if path else str(key))
    else:
        yield path, value
