"""What a run of a check leaves behind: a record of each rank, and rank 0's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dtrain.trials.records import EventLog, events, open_tensors


@dataclass(slots=True)
class Examined:
    """What a look at the loss function and the data found, after the last step.

    Attributes:
        mean_gap: how far the loss of a batch is from the weighted mean of the losses of two
            parts of it, relative to it, where that is farthest; None where it is not known.
        mean_evidence: the same in words, with the numbers.
        failures: what could not be tried, and why.
        draws: what in the loss function draws random numbers, dropout aside, in words.
        data_draws: the same sample comes out otherwise from other random streams.
        data_wanders: it comes out otherwise from the same streams, fetched again.
    """

    mean_gap: float | None = None
    mean_evidence: str = ""
    failures: list[str] = field(default_factory=list)
    draws: str = ""
    data_draws: bool = False
    data_wanders: bool = False


@dataclass(slots=True)
class Record:
    """What one rank saw.

    Attributes:
        steps: steps taken.
        losses: of each step, over all ranks.
        own_losses: of each of this rank's micro-batches, as the loss function returned it.
        own_weights: what it said they weigh.
        dtype: in which the loss came.
        samples: for each step a digest of each sample this rank had.
        settings: for each step the optimizer's numbers, by group.
        own_parameters: a digest of this rank's parameters after the last step.
        batch_size: the global batch, as the script asked for; None for a stream.
        given_model: a digest of the model as the script made it, before ranks were made equal.
        seen: ``"dropout"``, ``"batchnorm"``, ``"mixup"``, where they were in effect.
        moving_buffers: buffers that training changes, BatchNorm's aside.
        examined: if that was asked for.
    """

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    own_losses: list[float] = field(default_factory=list)
    own_weights: list[float] = field(default_factory=list)
    dtype: str = ""
    samples: list[list[str]] = field(default_factory=list)
    settings: list[list[dict[str, Any]]] = field(default_factory=list)
    own_parameters: str = ""
    batch_size: int | None = None
    given_model: str = ""
    seen: list[str] = field(default_factory=list)
    moving_buffers: list[str] = field(default_factory=list)
    examined: Examined | None = None

    def write(self, folder: Path, rank: int) -> None:
        """Writes it to ``folder``."""
        EventLog(folder, rank).tell("record", **asdict(self))


@dataclass(frozen=True, slots=True)
class Results:
    """A run's folder, read: every rank's record, and rank 0's tensors when asked for."""

    folder: Path
    ranks: list[Record]

    @classmethod
    def read(cls, folder: Path, ranks: int) -> Results:
        """Reads what ``ranks`` ranks wrote."""
        records = []
        for rank in range(ranks):
            values = events(folder, rank)[-1]
            del values["event"]
            examined = values.pop("examined")
            record = Record(**values, examined=None if examined is None else Examined(**examined))
            records.append(record)
        return cls(folder, records)

    @property
    def main(self) -> Record:
        """Rank 0's record."""
        return self.ranks[0]

    def forget_gradients(self) -> None:
        """Deletes them: they are most of what a run leaves on the disk."""
        for path in self.folder.glob(f"{gradients_name('*')}.safetensors"):
            path.unlink()

    def tensors(self, name: str) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Opens rank 0's tensors of that name."""
        return open_tensors(self.folder, name)


def gradients_name(step: int | Literal["*"]) -> str:
    """Returns the name of the file with the gradients of a step, or a pattern for all steps."""
    return f"gradients-{step}"
