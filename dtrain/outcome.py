"""What became of a step: looked at when somebody asks, or when it has arrived."""

from __future__ import annotations

from dtrain.lane import Arriving, Heard, LaneSilent, Verdict
from dtrain.strategies import Strategy


class Outcome:
    """What became of a step. On CUDA, the first to ask waits for the device.

    Args:
        strategy: which has just run the step's last micro-batch.

    Raises:
        UnusedParameters: names parameters whose gradients never arrived.

    Ranks: all, local.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self.heard: Heard = strategy.heard()
        #: Whether the update was held back; on CUDA that may still be on its way.
        self.blocked: bool | Arriving = True

    def verdict(self) -> Verdict:
        """Returns what all ranks said.

        Raises:
            UnusedParameters: names parameters whose gradients never arrived.
        """
        try:
            return self.heard.verdict()
        except LaneSilent as silent:
            raise self._strategy.unused() from silent

    @property
    def loss_mean(self) -> float:
        """The loss of the global batch."""
        return self.verdict().loss_mean

    @property
    def weight(self) -> float:
        """Units in the global batch."""
        return self.verdict().weight

    @property
    def nonfinite(self) -> int:
        """Micro-batches whose loss was NaN or infinite."""
        return self.verdict().nonfinite

    @property
    def applied(self) -> bool:
        """Whether the optimizer's update was applied."""
        if isinstance(self.blocked, Arriving):
            self.blocked = self.blocked.get()[0] > 0
        return not self.blocked
