"""The precision slot: in which numbers the model computes. Full precision is the null object."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Precision:
    """Full precision: nothing is cast, nothing is scaled. Other precisions override.

    Ranks: all, local. Gradients are already reduced when they are unscaled, so ranks agree.
    """

    name = "full precision"
    scales_loss = False

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the loss function runs."""
        return nullcontext()

    def scale(self, loss: Tensor) -> Tensor:
        """Returns the loss that backward starts from."""
        return loss

    def unscale(self, optimizer: Optimizer, factor: float) -> float:
        """Divides gradients by the loss scale; called once a step, after the reduction.

        Args:
            optimizer: of the gradients.
            factor: what they must be multiplied by besides.

        Returns:
            The factor that is left to be applied: 1 where unscaling took it in.
        """
        return factor

    def step(self, optimizer: Optimizer) -> bool:
        """Steps the optimizer; returns False where gradients overflowed and it did not."""
        optimizer.step()
        return True

    def skip(self) -> None:
        """Ends a step whose update is not applied."""

    def values(self) -> dict[str, float]:
        """Returns figures worth reporting."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""


class Autocast(Precision):
    """Runs the loss function under ``torch.autocast``; for bfloat16 that is all it takes."""

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        self.name = str(dtype).removeprefix("torch.") + " autocast"
        self._device_type = device_type
        self._dtype = dtype

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the loss function runs."""
        return torch.autocast(self._device_type, dtype=self._dtype)


class ScaledAutocast(Autocast):
    """Autocast with a dynamic loss scale, for float16, whose gradients would underflow.

    The scale is doubled after ``growth_interval`` steps without overflow and halved after
    one; see Micikevicius et al., "Mixed Precision Training", ICLR 2018.
    """

    scales_loss = True

    def __init__(
        self, device_type: str, dtype: torch.dtype, init_scale: float, growth_interval: int
    ) -> None:
        super().__init__(device_type, dtype)
        self._scaler = _Scaler(device_type, init_scale=init_scale, growth_interval=growth_interval)

    def scale(self, loss: Tensor) -> Tensor:
        """Returns the loss times the loss scale."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Optimizer, factor: float) -> float:
        """Divides gradients by the loss scale and finds out whether any overflowed."""
        self._scaler.factor = factor
        self._scaler.unscale_(optimizer)
        return 1.0

    def step(self, optimizer: Optimizer) -> bool:
        """Steps the optimizer unless gradients overflowed; adapts the scale."""
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        # The scale shrinks only after an overflow; GradScaler tells it in no other way.
        return self._scaler.get_scale() >= before

    def skip(self) -> None:
        """Ends a step whose update is not applied; an overflow still adapts the scale."""
        self._scaler.update()

    def values(self) -> dict[str, float]:
        """Returns the loss scale."""
        return {"loss_scale": self._scaler.get_scale()}

    def state_dict(self) -> dict[str, Any]:
        """Returns the scale and its growth counter."""
        return dict(self._scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the scale and its growth counter."""
        self._scaler.load_state_dict(state)


class _Scaler(torch.amp.GradScaler):
    """A GradScaler whose one pass over the gradients applies another factor as well."""

    factor = 1.0

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        return super()._unscale_grads_(optimizer, inv_scale * self.factor, found_inf, allow_fp16)
