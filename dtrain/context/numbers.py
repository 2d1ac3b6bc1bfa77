"""Numbers of the host as tensors of the device."""

import torch
from torch import Tensor


def on_device(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a number as a 0-dim tensor on the device, without waiting for it.

    A number of the host is filled in there. To copy it, as ``torch.as_tensor`` does, the host
    would wait for all that the device was given before.
    """
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype).reshape(())
    return torch.full((), value, dtype=dtype, device=device)
