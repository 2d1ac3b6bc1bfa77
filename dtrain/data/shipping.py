"""From the host's memory to the device, without waiting for it.

Ranks: all, local.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor


def ship(batch: Any, device: torch.device) -> Any:
    """Returns a batch on the device; on CUDA the copy is on its way while the host goes on.

    There it has a stream of its own, beside what the device still computes for the step before.
    """
    if device.type != "cuda":
        return send_to_device(batch, device, non_blocking=True)
    batch = pinned(batch)
    if not _is_of_host(batch):
        return send_to_device(batch, device, non_blocking=True)
    beside, here = _stream_of_copies(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        shipped = send_to_device(batch, device, non_blocking=True)
    here.wait_stream(beside)
    for tensor in tensors_of(shipped):
        # Its memory belongs to the other stream, which may fill it again once it is let go of.
        tensor.record_stream(here)
    return shipped


@cache
def _stream_of_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _is_of_host(batch: Any) -> bool:
    """Says whether all of it lies in the host's memory, in what :func:`tensors_of` looks into."""
    kind = type(batch)
    if kind is list or kind is tuple:
        return all(map(_is_of_host, batch))
    if kind is dict:
        return all(map(_is_of_host, batch.values()))
    if kind is torch.Tensor:
        return bool(batch.device.type == "cpu" and batch.layout == torch.strided)
    return not hasattr(batch, "to")


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yields the tensors of a batch: those in lists, tuples and mappings, too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, list | tuple):
        for part in value:
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
