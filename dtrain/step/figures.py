"""Training figures, from one report to the next."""

from dataclasses import dataclass

from dtrain.context import Context, Outbox, Step
from dtrain.metrics import Means
from dtrain.step.lane import Verdict
from dtrain.watchdog import SECONDS_METRIC, StragglerClock


@dataclass
class Figures:
    """Adds up what steps say, and agrees on it.

    Ranks: all; local where a method does not say otherwise.
    """

    means: Means  # of the loss function's metrics
    outbox: Outbox  # what callbacks have logged
    clock: StragglerClock
    _loss_sum: float = 0.0  # agreed, as is its weight
    _weight: float = 0.0

    @property
    def are_new(self) -> bool:
        """Whether a step has counted since the last report; equal on all ranks."""
        return bool(self._weight)

    def count(self, step: Step, verdict: Verdict) -> None:
        """Adds a step's loss."""
        # A step that was left out for its loss must not make the whole report's loss NaN.
        if verdict.weight > 0 and not (step.vetoed and verdict.nonfinite):
            self._loss_sum += verdict.loss_mean * verdict.weight
            self._weight += verdict.weight

    def agree(self, context: Context) -> dict[str, float]:
        """Returns figures since the last report; says who holds up the others, if somebody does.

        Ranks: all, communicates.
        """
        for name, logged in self.outbox.logged.items():
            self.means.add_logged(name, logged.values, logged.reduce)
        self.outbox.logged.clear()
        values = {"train/loss": self._loss_sum / self._weight} if self._weight else {}
        self._loss_sum = self._weight = 0.0
        self.means.add(SECONDS_METRIC, self.clock.seconds, 1)
        values |= self.means.agree(context.comm)
        if straggler := self.clock.compare(values.pop(SECONDS_METRIC)):
            context.say(f"warning: {straggler}")
        if values:
            values["lr"] = float(context.optimizer.param_groups[0]["lr"])
        return values
