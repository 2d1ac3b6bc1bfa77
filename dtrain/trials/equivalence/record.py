"""What a run left behind: a JSON file of each rank, and rank 0's tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(slots=True)
class Examined:
    """What a look at the loss function and the data found, after the last step.

    Attributes:
        step: the step of whose batch the following are, the one where they are farthest apart.
        whole: the loss of the batch.
        parts: the weighted mean of the losses of two parts of it.
        mode: which mode the model was in then, ``"eval"`` or ``"train"``.
        sizes: samples of those parts.
        weights: what the loss function said they weigh.
        tried_parts: the six above are known.
        failures: what could not be tried, and why.
        draws: torch's functions that draw random numbers in the loss function, dropout aside.
        own_generator: some of them draw from a generator of the user's.
        streams: which global streams (torch, numpy, python) the loss function draws from.
        data_draws: the same sample comes out otherwise from other random streams.
        data_wanders: it comes out otherwise from the same streams, fetched again.
    """

    step: int = 0
    whole: float = 0.0
    parts: float = 0.0
    mode: str = ""
    sizes: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    tried_parts: bool = False
    failures: list[str] = field(default_factory=list)
    draws: list[str] = field(default_factory=list)
    own_generator: bool = False
    streams: list[str] = field(default_factory=list)
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
        sample_shapes: shapes of samples as they came, to tell padding from data.
        settings: for each step the optimizer's numbers, by group.
        own_parameters: a digest of this rank's parameters after the last step.
        batch_size: the global batch, as the script asked for; None for a stream.
        given_model: a digest of the model as the script made it, before ranks were made equal.
        seen: ``"dropout"``, ``"batchnorm"``, ``"mixup"``, where they were in effect.
        callbacks_draw: a callback's ``on_batch`` drew from this rank's random streams.
        moving_buffers: buffers that training changes, BatchNorm's aside.
        examined: if that was asked for.
    """

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    own_losses: list[float] = field(default_factory=list)
    own_weights: list[float] = field(default_factory=list)
    dtype: str = ""
    samples: list[list[str]] = field(default_factory=list)
    sample_shapes: list[str] = field(default_factory=list)
    settings: list[list[dict[str, Any]]] = field(default_factory=list)
    batch_size: int | None = None
    given_model: str = ""
    own_parameters: str = ""
    seen: list[str] = field(default_factory=list)
    callbacks_draw: bool = False
    moving_buffers: list[str] = field(default_factory=list)
    examined: Examined | None = None

    def write(self, folder: Path, rank: int) -> None:
        """Writes it to ``folder``.

        Ranks: all, local.
        """
        (folder / f"rank-{rank}.json").write_text(json.dumps(asdict(self)))


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
            values = json.loads((folder / f"rank-{rank}.json").read_text())
            examined = values.pop("examined")
            record = Record(**values)
            record.examined = None if examined is None else Examined(**examined)
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

    @contextmanager
    def tensors(self, name: str) -> Iterator[Mapping[str, Tensor]]:
        """Opens what :func:`write_tensors` wrote; a tensor is read when it is looked up."""
        with safe_open(self.folder / f"{name}.safetensors", framework="pt") as file:
            yield _Lazy(file)


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors to a file that :meth:`Results.tensors` opens.

    Ranks: one; local.
    """
    ready = {key: _dense(tensor) for key, tensor in tensors.items()}
    save_file(ready, folder / f"{name}.safetensors")


def gradients_name(step: int | Literal["*"]) -> str:
    """Returns the name of the file with the gradients of a step, or a pattern for all steps."""
    return f"gradients-{step}"


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
    return tensor.cpu().contiguous().clone()


class _Lazy(Mapping[str, Tensor]):
    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = sorted(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
