"""An exponential moving average of the weights, evaluated in their place."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Not AveragedModel: it deep-copies the model, and reads a counter from the device in each step.
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dtrain.callback import CountAs
from dtrain.callbacks.argument_checks import check_counts
from dtrain.callbacks.averaged_weights import AveragedWeights
from dtrain.context import Context, Step
from dtrain.errors import ConfigError


class EMA(AveragedWeights):
    """Keeps an exponential moving average of the parameters, and evaluates it.

    After an applied update, ``average = d * average + (1 - d) * parameter`` (Polyak and Juditsky,
    "Acceleration of stochastic approximation by averaging", 1992, with exponential weights). It
    starts as the parameters are. With ``warmup``, ``d = min(decay, (1 + t) / (10 + t))`` after
    ``t`` updates of the average, as in TensorFlow, so that the first weights are soon forgotten.

    Parameters that require a gradient are averaged, in float32 at least; buffers are not: an
    evaluation sees the model's own. The averages are what counts: evaluations see them,
    ``load_model`` gives them, and after ``fit`` the model holds them. The training goes on from its
    own weights, also in a further ``fit`` or after a resume; checkpoints hold both.

    Args:
        decay: ``d``, from 0 to less than 1.
        warmup: begin with a smaller ``d``.
        every: average after every so many applied updates; ``decay`` is for each averaging.
        use_at_end: False for averages that only evaluations see: after ``fit`` the model holds its
            own weights, and ``load_model`` gives these (the averages: ``which="averaged"``).
    """

    late_step_end = True  # the parameters are still those of the step

    def __init__(
        self, decay: float = 0.999, *, warmup: bool = True, every: int = 1, use_at_end: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"EMA(decay={decay}): must be from 0 to less than 1, such as 0.999")
        check_counts("EMA", every=every)
        self._decay = decay
        self._warmup = warmup
        self._every = every
        self._use_at_end = use_at_end
        self.updates = 0

    def on_epoch_start(self, ctx: Context) -> None:
        self._begin(ctx)

    def on_step_end(self, ctx: Context, step: Step) -> None:
        if self._taken != ctx._taken:
            self._follow(ctx)
        if step.applied and ctx.progress.updates % self._every == 0:
            self._average(get_ema_multi_avg_fn(self.decay_at(self.updates)), self.updates)
            self.updates += 1

    def weights(self, which: CountAs) -> Mapping[str, Tensor] | None:
        counts = which in ("evaluated", "averaged") or (which == "final" and self._use_at_end)
        return self.averages if counts else None

    def decay_at(self, updates: int) -> float:
        """Returns ``d`` after so many updates of the average."""
        return min(self._decay, (1 + updates) / (10 + updates)) if self._warmup else self._decay

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.updates = state["updates"]
