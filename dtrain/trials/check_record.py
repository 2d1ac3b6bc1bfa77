"""What a run of a check leaves behind: a record of each rank, and rank 0's tensors."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dtrain.trials.records import EventLog, events, read_tensors


@dataclass(slots=True)
class Examined:
    """What a look at the loss function and the data found, after the last step."""

    #: How far the loss of a batch is from the weighted mean of the losses of two parts of it,
    #: relative to it, where that is farthest; None where it is not known. And in words.
    mean_gap: float | None = None
    mean_evidence: str = ""
    failures: list[str] = field(default_factory=list)  # what could not be tried, and why
    draws: str = ""  # what in the loss function draws random numbers, dropout aside, in words
    data_draws: bool = False  # the same sample comes out otherwise from other random streams
    data_wanders: bool = False  # ... from the same streams, fetched again


@dataclass(slots=True)
class Record:
    """What one rank saw."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)  # of each step, over all ranks
    #: Of each of this rank's micro-batches, as the loss function returned them.
    own_losses: list[float] = field(default_factory=list)
    own_weights: list[float] = field(default_factory=list)
    dtype: str = ""  # in which the loss came
    #: For each step, a digest of each sample this rank had; and the optimizer's numbers, by group.
    samples: list[list[str]] = field(default_factory=list)
    settings: list[list[dict[str, Any]]] = field(default_factory=list)
    own_parameters: str = ""  # a digest of this rank's, after the last step
    batch_size: int | None = None  # the global batch the script asked for; None for a stream
    given_model: str = ""  # a digest of it as the script made it, before ranks were made equal
    seen: list[str] = field(default_factory=list)  # of dropout, batchnorm, mixup: what was on
    moving_buffers: list[str] = field(default_factory=list)  # that training changes
    examined: Examined | None = None  # if that was asked for

    def write(self, folder: Path, rank: int) -> None:
        """Writes it, for :meth:`Results.read`."""
        EventLog(folder, rank).tell("record", record=asdict(self))


@dataclass(frozen=True, slots=True)
class Results:
    """A run's folder, read: every rank's record, and rank 0's tensors when asked for."""

    folder: Path
    ranks: list[Record]

    @classmethod
    def read(cls, folder: Path, ranks: int) -> "Results":
        """Reads what ``ranks`` ranks wrote."""
        records = []
        for rank in range(ranks):
            values: dict[str, Any] = events(folder, rank)[-1]["record"]
            if values["examined"] is not None:
                values["examined"] = Examined(**values["examined"])
            records.append(Record(**values))
        return cls(folder, records)

    @property
    def main(self) -> Record:
        """Rank 0's record."""
        return self.ranks[0]

    def forget_gradients(self) -> None:
        """Deletes them: they are most of what a run leaves on the disk."""
        for path in self.folder.glob(f"{gradients_name('*')}.safetensors"):
            path.unlink()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Reads rank 0's tensors of that name."""
        return read_tensors(self.folder, name)


def gradients_name(step: int | Literal["*"]) -> str:
    """Returns the name of the file with the gradients of a step, or a pattern for all steps."""
    return f"gradients-{step}"
