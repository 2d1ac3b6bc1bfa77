"""The result of a step: looked at when somebody asks, or when it has arrived."""

from __future__ import annotations

from typing import Protocol

from dtrain.context import Progress
from dtrain.errors import UnusedParameters
from dtrain.step.arriving import Arriving
from dtrain.step.lane import Heard, LaneSilent, Verdict


class Reduction(Protocol):
    """What has just reduced a step's gradients."""

    def heard(self) -> Heard:
        """Returns what all ranks said."""
        ...

    def unused(self) -> UnusedParameters:
        """Returns the error for a step that turns out to have met no other rank's."""
        ...


class StepResult:
    """What became of a step. On CUDA, the first to ask waits for the device.

    Args:
        strategy: which has just run the step's last micro-batch.
        progress: counts the update, once it is known whether it was applied.

    Raises:
        UnusedParameters: names parameters whose gradients never arrived.

    Ranks: all, local.
    """

    def __init__(self, strategy: Reduction, progress: Progress) -> None:
        self._strategy = strategy
        self._progress = progress
        self.heard: Heard = strategy.heard()
        #: Whether the update was held back; on CUDA that may still be on its way.
        self._blocked: bool | Arriving = True

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
        self.arrive()
        return not self._blocked

    def settle(self, *, blocked: bool | Arriving) -> None:
        """Says whether the update was held back, and counts it as soon as that is known.

        So whoever asks whether a step was applied finds it counted in ``progress.updates``.
        """
        self._blocked = blocked
        if blocked is False:
            self._progress.updates += 1

    def arrive(self) -> None:
        """Waits until it is known whether the update was held back."""
        if isinstance(self._blocked, Arriving):
            self.settle(blocked=self._blocked.get()[0] > 0)
