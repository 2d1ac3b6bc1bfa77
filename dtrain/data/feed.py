"""What a feed is: all steps of a run, on one rank, as micro-batches on its device.

The loop runs by the plan of global steps. A rank whose share of a step is empty gets a step
without micro-batches, and takes part idle.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from operator import attrgetter
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from dtrain.data.counting import tensors_of

_IS_CPU = attrgetter("is_cpu")

# On the device, and its number of samples. A batch of None has nothing left: all were left out.
MicroBatch = tuple[Any, int]


class EndOfStream(Exception):
    """This rank's stream of batches has ended."""


class MicroBatches(Protocol):
    """The micro-batches of one global step, on one rank."""

    micros: int  # how many micro-steps it has, equal on all ranks; some may be idle on this one

    def next(self) -> MicroBatch | None:
        """Returns a batch, or None for nothing; raises EndOfStream if the epoch has no more."""

    def is_last(self) -> bool:
        """Says whether the epoch must end with this step, for want of data on this rank."""
        return False


class Feed(Protocol):
    """All steps of a run, on one rank; ``str()`` must be equal on all. Ranks: all, local."""

    steps_per_epoch: int | None  # None where nobody can know

    def begin(self, epoch: int) -> None:
        """Tells the data that an epoch of training begins, and looks how long it is now.

        Raises RankMismatch where ranks have other samples, or another order of them. Ranks: all,
        communicates.
        """

    def compare(self, label: str) -> None:
        """Raises RankMismatch, before an evaluation, where ranks have other samples in it.

        Ranks: all, communicates, once.
        """
        return

    def look_apart(self) -> str:
        """Returns what to tell where streams that are to be each rank's own are the same.

        Ranks: all, communicates, once.
        """
        return ""

    def epoch(self, epoch: int, first_step: int) -> Iterator[MicroBatches]:
        """Yields the steps of ``epoch`` from ``first_step`` on; a stream's without end."""

    def rows(self, epoch: int, step: int) -> list[int] | None:
        """Returns the dataset's rows that this rank has in a step; None where it has no rows."""
        return None

    def state_dict(self, epoch: int, step: int) -> dict[str, Any] | None:
        """Returns what the plan does not tell of this rank's place, ``step`` steps into ``epoch``.

        Raises CheckpointError where it holds what a checkpoint cannot.
        """
        return None

    def load_state_dict(
        self, state: dict[str, Any] | None, *, ranks: int, epoch: int, step: int
    ) -> str:
        """Takes up what this rank saved, as one of ``ranks``; ``step`` of ``epoch`` comes next.

        Returns in words what is not restored; raises ResumeError if this many ranks cannot go on.
        """
        return ""


def tell_epoch(data: Any, epoch: int) -> None:
    """Calls ``set_epoch`` of what shuffles or augments by it: a dataset, or one that it wraps."""
    if callable(tell := getattr(data, "set_epoch", None)):
        tell(epoch)
        return
    several = getattr(data, "datasets", None)  # as in a ConcatDataset
    for inner in [getattr(data, "dataset", None), *(several if type(several) is list else [])]:
        if inner is not None and inner is not data:
            tell_epoch(inner, epoch)


def ship(batch: Any, device: torch.device) -> Any:
    """Returns a batch on the device; on CUDA the copy is on its way while the host goes on.

    There it has a stream of its own, beside what the device still computes for the step before.
    """
    kind = type(batch)
    has_tensors_only = (kind is tuple or kind is list) and {*map(type, batch)} == {Tensor}
    if has_tensors_only and device.type == "cpu" and all(map(_IS_CPU, batch)):
        return kind(batch)  # most batches of the CPU; each step takes 2 microseconds less
    if device.type != "cuda" or not _is_of_host(batch := pinned(batch)):
        if not is_dataclass(batch):
            return send_to_device(batch, device, non_blocking=True)
        return _sent(batch, device)
    beside, here = _stream_of_copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        shipped = _sent(batch, device)
    here.wait_stream(beside)
    for tensor in tensors_of(shipped):
        # Its memory belongs to the other stream, which may fill it again once it is let go of.
        tensor.record_stream(here)
    return shipped


_stream_of_copies = cache(torch.cuda.Stream)  # one for each device


def _sent(batch: Any, device: torch.device) -> Any:
    if _is_plain_dataclass(batch):  # which accelerate leaves where it is
        return _of_fields(batch, partial(_sent, device=device))
    return send_to_device(batch, device, non_blocking=True)


def _is_plain_dataclass(value: Any) -> bool:
    return is_dataclass(value) and not (isinstance(value, Mapping) or hasattr(value, "to"))


def _of_fields(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Returns a copy of a dataclass with ``function`` of each field."""
    made = copy.copy(batch)
    for field in fields(batch):
        if hasattr(batch, field.name):
            object.__setattr__(made, field.name, function(getattr(batch, field.name)))  # if frozen
    return made


def _is_of_host(batch: Any) -> bool:
    """Says whether all of it lies in the host's memory, in what :func:`tensors_of` looks into."""
    kind = type(batch)
    if kind is list or kind is tuple:
        return all(map(_is_of_host, batch))
    if kind is dict:
        return all(map(_is_of_host, batch.values()))
    if kind is Tensor:
        return bool(batch.device.type == "cpu" and batch.layout == torch.strided)
    if _is_plain_dataclass(batch):
        return all(_is_of_host(getattr(batch, field.name, None)) for field in fields(batch))
    return not hasattr(batch, "to")


def pinned(batch: Any) -> Any:
    """Returns a batch with its tensors in pinned memory; what is pinned already is not copied.

    From other memory, CUDA copies only after what the device was given before: the host would wait
    for that. Looks into lists, tuples, dicts and dataclasses; all else is left as it is, and is
    then waited for.
    """
    kind = type(batch)
    if isinstance(batch, Tensor):
        is_plain = batch.device.type == "cpu" and batch.layout == torch.strided
        return batch.pin_memory() if is_plain else batch
    if kind is list or kind is tuple:
        return kind(pinned(part) for part in batch)
    if kind is dict:
        return {name: pinned(part) for name, part in batch.items()}
    return _of_fields(batch, pinned) if _is_plain_dataclass(batch) else batch
