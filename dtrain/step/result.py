"""The result of a step: looked at when somebody asks, or when it has arrived."""

from typing import NamedTuple, Protocol

from torch import Tensor

from dtrain.context import Progress
from dtrain.errors import UnusedParameters
from dtrain.step.arriving import Arriving
from dtrain.step.lane import Heard, LaneSilent, Verdict
from dtrain.step.precision import Factor


class Reduction(Protocol):
    """What has just reduced a step's gradients."""

    def heard(self) -> Heard:
        """Returns what all ranks said."""
        ...

    def check_arrived(self) -> None:
        """Looks whether each parameter has a gradient."""
        ...

    def unused(self) -> UnusedParameters:
        """Returns the error for a step that turns out to have met no other rank's."""
        ...


class Gate(NamedTuple):
    """What may be applied of a step: numbers where they are known, else tensors on the device.

    Attributes:
        factor: what the reduced gradients must be multiplied by.
        closed: whether the parameters must stay as they are.
        undone: whether the step does not count at all; False where that is not known yet.
    """

    factor: Factor
    closed: bool | Tensor
    undone: bool


class StepResult:
    """The result of a step. On CUDA, the first to ask waits for the device.

    Args:
        reduction: of the step, whose last micro-batch has just run.
        progress: counts the update, once it is known whether it was applied.

    Raises:
        UnusedParameters: names parameters whose gradients never arrived.

    Ranks: all, local.
    """

    def __init__(self, reduction: Reduction, progress: Progress) -> None:
        self._reduction = reduction
        self._progress = progress
        self._heard = reduction.heard()
        #: Whether the update was held back; on CUDA that may still be on its way.
        self._blocked: bool | Arriving = True

    def gate(self, *, waits: bool) -> Gate:
        """Returns what may be applied; only where it ``waits``, as numbers.

        Raises:
            UnusedParameters: names parameters whose gradients never arrived.
        """
        if waits:
            verdict = self.verdict()
            return Gate(verdict.factor, not verdict.weight > 0, verdict.undone)
        self._reduction.check_arrived()
        return Gate(self._heard.factor(), self._heard.veto(), False)

    def verdict(self) -> Verdict:
        """Returns what all ranks said.

        Raises:
            UnusedParameters: names parameters whose gradients never arrived.
        """
        try:
            return self._heard.verdict()
        except LaneSilent as silent:
            raise self._reduction.unused() from silent

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

    def settle(self, blocked: bool | Tensor) -> None:
        """Says whether the update was held back, and counts it as soon as that is known.

        So whoever asks whether a step was applied finds it counted in ``progress.updates``.
        """
        self._blocked = Arriving(blocked.reshape(1)) if isinstance(blocked, Tensor) else blocked
        if blocked is False:
            self._progress.updates += 1

    def arrive(self) -> None:
        """Waits until it is known whether the update was held back."""
        if isinstance(self._blocked, Arriving):
            self.settle(self._blocked.get()[0] > 0)
