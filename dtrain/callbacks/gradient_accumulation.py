"""Gradient accumulation, in micro-batches: fills the accumulation slot."""

from dtrain.callback import Callback
from dtrain.callbacks.argument_checks import check_counts
from dtrain.data import split_share
from dtrain.errors import ConfigError


class GradientAccumulation(Callback):
    """Splits each rank's share of the global batch, to save memory. The training is the same.

    Gradients of all micro-batches are summed with their weights and reduced once, in the
    last. For a stream of ready batches, ``steps`` consecutive ones make a step.

    Args:
        steps: into how many micro-batches.
        micro_batch_size: into micro-batches of how many samples; the last may be smaller. One of
            the two must be given. Evaluations and predictions are then cut into micro-batches of
            this size, alike at any number of ranks.
    """

    def __init__(self, steps: int | None = None, *, micro_batch_size: int | None = None) -> None:
        if (steps is None) == (micro_batch_size is None):
            raise ConfigError("GradientAccumulation: give steps or micro_batch_size, one of them")
        check_counts(
            "GradientAccumulation", or_none=True, steps=steps, micro_batch_size=micro_batch_size
        )
        self._steps = steps
        self.micro_batch_size = micro_batch_size or 0

    def split(self, share: int) -> list[int]:
        if self._steps is not None:
            return split_share(share, steps=self._steps)
        whole, rest = divmod(share, self.micro_batch_size)
        return [self.micro_batch_size] * whole + [rest] * (rest > 0)

    def batches_per_step(self) -> int:
        if self._steps is None:
            raise ConfigError(
                "GradientAccumulation(micro_batch_size=...) cannot split the ready batches of an "
                "iterable; use GradientAccumulation(steps=...)"
            )
        return self._steps
