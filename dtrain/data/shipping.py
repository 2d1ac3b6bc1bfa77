"""From the host's memory to the device, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor


def ship(batch: Any, device: torch.device) -> Any:
    """Returns a batch on the device; on CUDA the copy is on its way while the host goes on.

    Ranks: all, local.
    """
    if device.type == "cuda":
        batch = pinned(batch)
    return send_to_device(batch, device, non_blocking=True)


def pinned(batch: Any) -> Any:
    """Returns a batch with its tensors in pinned memory; what is pinned already is not copied.

    From other memory, CUDA copies only after what the device was given before: the host would wait
    for that. Looks into lists, tuples and dicts; all else is left as it is, and is then waited for.

    Ranks: all, local.
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
