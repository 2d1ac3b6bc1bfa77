"""Numbers on their way from the device to the host."""

import torch
from torch import Tensor


class Arriving:
    """A vector on its way to the host; whoever asks for it waits only for what came before.

    Reading it with ``.item()`` would wait for all that the device was given since.
    """

    __slots__ = ("_event", "_host", "_values")

    def __init__(self, tensor: Tensor) -> None:
        self._values: list[float] | None = None
        if tensor.device.type == "cpu":
            self._values = tensor.tolist()
            return
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._host.copy_(tensor.detach(), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def get(self) -> list[float]:
        """Returns its values, on the host."""
        if self._values is None:
            self._event.synchronize()
            self._values = self._host.tolist()
        return self._values
