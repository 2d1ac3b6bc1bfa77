"""What keeps the replicas of a model equal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dtrain.distributed.comm import Comm


def share_buffers(model: nn.Module, comm: Comm) -> None:
    """Gives all ranks rank 0's buffers (such as BatchNorm's running statistics).

    Ranks: all, communicates: once for each dtype among the buffers.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for dtype, buffers in by_dtype.items():
        flat = torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
        flat = comm.broadcast(f"buffers of {dtype}", flat)
        for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.detach().copy_(values.view_as(buffer))
