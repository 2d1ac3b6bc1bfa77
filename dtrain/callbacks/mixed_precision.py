"""Mixed precision: compute in 16 bits, keep parameters in 32. Fills the precision slot."""

from typing import Literal

import torch

from dtrain.callback import Callback
from dtrain.context import Context
from dtrain.errors import ConfigError
from dtrain.step import Autocast, Precision, ScaledAutocast


class MixedPrecision(Callback):
    """Runs the loss function under autocast; in fp16 with a dynamic loss scale.

    In ``fp16`` gradients are unscaled before ``on_grads_ready``, so that clipping sees true ones; a
    step whose gradients overflowed is left out, and schedules do not count it. Reports and
    ``FitResult`` have ``updates``: how many were applied. Ten in a row that were not are warned of;
    a scale below 1e-4, at which nothing finite overflows, ends the run with a LossError.

    Args:
        dtype: what to compute in.
        init_scale: first loss scale (fp16).
        growth_interval: steps without overflow after which the scale doubles (fp16).
    """

    def __init__(
        self,
        dtype: Literal["bf16", "fp16"],
        *,
        init_scale: float = 65536.0,
        growth_interval: int = 2000,
    ) -> None:
        if dtype not in ("bf16", "fp16"):
            raise ConfigError(f"MixedPrecision({dtype!r}): choose 'bf16' or 'fp16'")
        if init_scale <= 0 or growth_interval < 1:
            raise ConfigError(
                f"MixedPrecision: init_scale={init_scale} must be more than 0, and "
                f"growth_interval={growth_interval} 1 or more"
            )
        self._dtype = dtype
        self._init_scale = init_scale
        self._growth_interval = growth_interval

    def on_fit_start(self, ctx: Context) -> None:
        trained = (p for p in ctx.model.parameters() if p.requires_grad)
        if ctx.loss_scaled and any(p.is_complex() for p in trained):
            raise ConfigError(
                "MixedPrecision('fp16') cannot unscale gradients of complex parameters: use 'bf16'"
            )

    def make_precision(self, device_type: str) -> Precision:
        if self._dtype == "bf16":
            return Autocast(device_type, torch.bfloat16)
        return ScaledAutocast(device_type, torch.float16, self._init_scale, self._growth_interval)
