"""What a feed is: all steps of a run, on one rank, as micro-batches on its device.

The loop runs by the plan of global steps. A rank whose share of a step is empty gets a step
without micro-batches, and takes part idle.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from operator import attrgetter
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from torch import Tensor

_IS_CPU = attrgetter("is_cpu")

MicroBatch = tuple[Any, int]  # on the device, and its number of samples


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

    def epoch(self, epoch: int, first_step: int) -> Iterator[MicroBatches]:
        """Yields the steps of ``epoch`` from ``first_step`` on; a stream's without end."""

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


def ship(batch: Any, device: torch.device) -> Any:
    """Returns a batch on the device; on CUDA the copy is on its way while the host goes on.

    There it has a stream of its own, beside what the device still computes for the step before.
    """
    kind = type(batch)
    has_tensors_only = (kind is tuple or kind is list) and {*map(type, batch)} == {Tensor}
    if has_tensors_only and device.type == "cpu" and all(map(_IS_CPU, batch)):
        return kind(batch)  # most batches of the CPU; each step takes 2 microseconds less
    if device.type != "cuda" or not _is_of_host(batch := pinned(batch)):
        return send_to_device(batch, device, non_blocking=True)
    beside, here = _stream_of_copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        shipped = send_to_device(batch, device, non_blocking=True)
    here.wait_stream(beside)
    for tensor in tensors_of(shipped):
        # Its memory belongs to the other stream, which may fill it again once it is let go of.
        tensor.record_stream(here)
    return shipped


_stream_of_copies = cache(torch.cuda.Stream)  # one for each device


def _is_of_host(batch: Any) -> bool:
    """Says whether all of it lies in the host's memory, in what :func:`tensors_of` looks into."""
    kind = type(batch)
    if kind is list or kind is tuple:
        return all(map(_is_of_host, batch))
    if kind is dict:
        return all(map(_is_of_host, batch.values()))
    if kind is Tensor:
        return bool(batch.device.type == "cpu" and batch.layout == torch.strided)
    return not hasattr(batch, "to")


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yields the tensors of a batch: those in lists, tuples and mappings, too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(part)


def pinned(batch: Any) -> Any:
    """Returns a batch with its tensors in pinned memory; what is pinned already is not copied.

    From other memory, CUDA copies only after what the device was given before: the host would wait
    for that. Looks into lists, tuples and dicts; all else is left as it is, and is then waited for.
    """
    kind = type(batch)
    if isinstance(batch, Tensor):
        is_plain = batch.device.type == "cpu" and batch.layout == torch.strided
        return batch.pin_memory() if is_plain else batch
    if kind is list or kind is tuple:
        return kind(pinned(part) for part in batch)
    if kind is dict:
        return {name: pinned(part) for name, part in batch.items()}
    return batch
