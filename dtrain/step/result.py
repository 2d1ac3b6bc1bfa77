"""The result of a step: looked at when somebody asks, or when it has arrived."""

from torch import Tensor

from dtrain.context import Progress
from dtrain.step.lane import Arriving, LaneSilent, Verdict
from dtrain.step.precision import Factor
from dtrain.step.strategy import Strategy


class StepResult:
    """The result of a step, whose last micro-batch has just run. On CUDA, who asks may wait for it.

    Whoever asks first may get UnusedParameters, with those whose gradients never arrived.
    """

    def __init__(self, strategy: Strategy, progress: Progress) -> None:
        self._strategy = strategy
        self._progress = progress  # counts the update, once it is known whether it was applied
        self._heard = strategy.heard()
        #: Whether the update was held back; on CUDA that may still be on its way.
        self._blocked: bool | Arriving = True

    def gate(self, *, waits: bool) -> tuple[Factor, bool | Tensor, bool]:
        """Returns what may be applied; numbers where it ``waits``, else tensors on the device.

        What gradients must be multiplied by, whether parameters must stay as they are, and whether
        the step does not count at all (False where that is not known yet).
        """
        if waits:
            verdict = self.verdict()
            return verdict.factor, not verdict.weight > 0, verdict.undone
        self._strategy.check_arrived()
        return self._heard.factor(), self._heard.veto(), False

    def verdict(self) -> Verdict:
        """Returns what all ranks said."""
        try:
            return self._heard.verdict()
        except LaneSilent as silent:
            raise self._strategy.unused() from silent

    # What hooks see of it; see :class:`dtrain.context.Step`.

    @property
    def loss_mean(self) -> float:
        return self.verdict().loss_mean

    @property
    def weight(self) -> float:
        return self.verdict().weight

    @property
    def nonfinite(self) -> int:
        return self.verdict().nonfinite

    @property
    def applied(self) -> bool:
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
