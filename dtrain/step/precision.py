"""The precision slot: in which numbers the model computes. Full precision is the null object."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.errors import LossError

Factor = float | Tensor

_MANY_OVERFLOWS = 10  # in a row: more than the search for a first scale takes
_LEAST_SCALE = 1e-4  # as fairseq's ``--min-loss-scale``


class Precision:
    """Full precision: nothing is cast, nothing is scaled. Other precisions override."""

    name = "full precision"
    scales_loss = False

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the loss function runs."""
        return nullcontext()

    def scale(self, loss: Tensor) -> Tensor:
        """Returns the loss that backward starts from."""
        return loss

    def unscale(self, optimizer: Optimizer, factor: Factor) -> Factor:
        """Divides gradients by the loss scale, once a step: reduced ones, so that ranks agree.

        Returns the factor that is left to be applied: 1 where unscaling took it in.
        """
        return factor

    def step(self, optimizer: Optimizer, order: "Order") -> bool | Tensor:
        """Steps the optimizer, unless nothing must change; returns whether nothing did."""
        blocked = order.closed
        if order.held is not None and blocked is not True:
            blocked = order.held if blocked is False else torch.maximum(order.held, blocked)
        if blocked is False and order.divisor is None:
            optimizer.step()
        else:
            order.step(optimizer, blocked)
        return blocked

    def skip(self) -> None:
        """Ends a step whose update is not applied; an overflow still adapts the scale."""

    def watch(self, *, applied: bool) -> str:
        """Is told what became of a step; returns what to tell the user, or nothing."""
        return ""

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
        self._overflows = 0  # in a row
        self._least_scale = min(_LEAST_SCALE, init_scale * _LEAST_SCALE)

    def scale(self, loss: Tensor) -> Tensor:
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Optimizer, factor: Factor) -> Factor:
        self._scaler.factor = factor
        self._scaler.unscale_(optimizer)
        return 1.0

    def step(self, optimizer: Optimizer, order: "Order") -> bool | Tensor:
        """Where gradients overflowed, only the scale is adapted; if closed, not even that."""
        overflow, closed = self._scaler.overflow, order.closed
        if closed is True:
            self._scaler.update_unless(torch.ones_like(overflow))
            return True
        if order.waits:
            # Not left to a fused optimizer: SGD would keep a first momentum that it never wrote.
            blocked: bool | Tensor = bool(overflow.item())
        else:
            # 1 where several are: a fused optimizer takes what it is handed off its count of steps.
            vetoes = [one for one in (closed, order.held) if isinstance(one, Tensor)]
            blocked = torch.clamp(sum(vetoes, overflow), max=1.0)
        order.step(optimizer, blocked)
        if isinstance(closed, Tensor):
            self._scaler.update_unless(closed)
        else:
            self._scaler.update()
        return blocked

    def skip(self) -> None:
        self._scaler.update()

    def watch(self, *, applied: bool) -> str:
        self._overflows = 0 if applied else self._overflows + 1
        if self._overflows < _MANY_OVERFLOWS:
            return ""
        scale = self.values()["loss_scale"]  # waits for the device, which is no loss here
        if self._overflows > _MANY_OVERFLOWS:
            return ""
        return (
            f"warning: in {self._overflows} steps in a row the {self.name} gradients overflowed, "
            f"so that none of these was applied; the loss scale is {scale:g} now, and below "
            f"{self._least_scale:g} the run ends. If the loss or a gradient is NaN or infinite by "
            "itself, NonFiniteGuard and bf16 help to find it."
        )

    def values(self) -> dict[str, float]:
        scale = float(self._scaler.get_scale())
        if scale < self._least_scale:
            raise LossError(
                f"the loss scale has fallen to {scale:g}: gradients in {self.name} are NaN or "
                f"infinite at any scale (in the last {self._overflows} steps in a row), and no "
                "such step is applied. Look for the cause in bf16 or full precision, where "
                "NonFiniteGuard names the module; or pass MixedPrecision('bf16')"
            )
        return {"loss_scale": scale}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state)


class _Scaler(torch.amp.GradScaler):
    """A GradScaler whose one pass over the gradients applies another factor as well."""

    factor: Factor = 1.0
    overflow: Tensor  # of the last unscaling: more than 0 where there was one

    def unscale_(self, optimizer: Optimizer) -> None:
        """As GradScaler's; also on a rank that was idle so far, and has scaled no loss yet."""
        if self._enabled and self._scale is None:
            device = optimizer.param_groups[0]["params"][0].device
            self._lazy_init_scale_growth_tracker(device)
        super().unscale_(optimizer)

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        is_one = isinstance(self.factor, float) and self.factor == 1.0
        inverse = inv_scale if is_one else (inv_scale * self.factor).float()
        found = super()._unscale_grads_(optimizer, inverse, found_inf, allow_fp16)
        if not found:  # no parameter has a gradient, so none overflowed
            found = {inv_scale.device: torch.zeros_like(inv_scale)}
        flags = [one.to(inv_scale.device) for one in found.values()]
        self.overflow = torch.stack(flags).sum() if len(flags) > 1 else flags[0].reshape(())
        return found

    def update_unless(self, veto: Tensor) -> None:
        """Adapts the scale, or leaves it where ``veto`` is 1."""
        scale, tracker = self._check_scale_growth_tracker("update")
        before = scale.clone(), tracker.clone()
        self.update()
        is_closed = veto > 0
        for now, then in zip((scale, tracker), before, strict=True):
            torch.where(is_closed, then, now, out=now)


class Order(NamedTuple):
    """What the optimizer is told with a step; tensors are for one that is fused."""

    closed: bool | Tensor = (
        False  # nothing must change; a tensor, 0-dim and on the device, is 0 or 1
    )
    held: Tensor | None = None  # the same, by callbacks that let the device decide
    divisor: Tensor | None = None  # of gradients
    waits: bool = True  # what is on the device may be waited for

    def step(self, optimizer: Optimizer, blocked: bool | Tensor) -> None:
        """Steps it, unless it is blocked."""
        if blocked is True:
            return
        if blocked is False and self.divisor is None:
            optimizer.step()
            return
        # As GradScaler hands both to fused optimizers.
        optimizer.grad_scale = self.divisor  # type: ignore[attr-defined]
        optimizer.found_inf = blocked if isinstance(blocked, Tensor) else None  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


@runtime_checkable
class PrecisionSlot(Protocol):
    """Fills the precision slot: autocast, scale, unscale and step."""

    def make_precision(self, device_type: str) -> Precision:
        """Returns what computes in the wanted precision on ``"cpu"`` or ``"cuda"``."""


@contextmanager
def fresh_casts() -> Iterator[None]:
    """Inside of the script's own ``torch.autocast``, has weights be cast as they are now.

    Torch keeps casts of weights until its outermost autocast ends: they would be those of weights
    that were updated, loaded or averaged since.
    """
    inside = torch.autocast_increment_nesting() > 1
    torch.autocast_decrement_nesting()
    before = torch.is_autocast_cache_enabled()
    if inside:
        torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        if inside:
            torch.clear_autocast_cache()
            torch.set_autocast_cache_enabled(before)
