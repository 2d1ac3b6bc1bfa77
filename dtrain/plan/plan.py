"""What a fit is told and what it tells: its plan, its recorder, its result."""

from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

from dtrain.checkpoint import ALL_EPOCHS, MAX_STEPS, Fit
from dtrain.context import Progress
from dtrain.distributed import World
from dtrain.errors import ConfigError
from dtrain.sinks import Report


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to train, and what to do on the way; see :meth:`dtrain.Trainer.fit`."""

    epochs: int | None  # of this fit in all; None for no such limit
    max_steps: int | None
    eval_every: int | str | None  # "epoch", or so many steps; None never evaluates
    log_every: int
    eval_first: bool = False
    history: int | None = None  # how many rows of figures the result has; all if None

    def __post_init__(self) -> None:
        if self.epochs is None and self.max_steps is None:
            raise ConfigError(
                "how long? pass epochs, max_steps, or both (the first reached counts)"
            )
        for name in ("epochs", "max_steps", "log_every", "history"):
            value = getattr(self, name)
            if not (value is None or _is_count(value)):
                raise ConfigError(f"{name}={value!r}: must be a whole number of 1 or more")
        every = self.eval_every
        if not (every is None or _is_count(every) or (isinstance(every, str) and every == "epoch")):
            raise ConfigError(f"eval_every={every!r}: 'epoch', a number of steps, or None")
        for name in ("epochs", "max_steps", "log_every", "history", "eval_every"):
            if isinstance(value := getattr(self, name), Integral):  # NumPy's are no JSON
                object.__setattr__(self, name, int(value))

    @property
    def limits(self) -> tuple[int | None, int | None]:
        """How many epochs and steps it has."""
        return self.epochs, self.max_steps

    def fulfilled_by(self, progress: Progress) -> str:
        """Returns why ``progress`` is all that was planned, or nothing where it is not."""
        step, epoch = progress.step - progress.first_step, progress.epoch - progress.first_epoch
        if self.max_steps is not None and step >= self.max_steps:
            return MAX_STEPS
        if self.epochs is not None and epoch >= self.epochs:
            return ALL_EPOCHS
        return ""

    def check_left(self, progress: Progress) -> None:
        """Raises ConfigError where ``progress`` is all that was planned."""
        if self.fulfilled_by(progress):
            raise ConfigError(
                f"this fit has done {progress.epoch - progress.first_epoch} epochs and "
                f"{progress.step - progress.first_step} steps already, by an earlier call of its "
                "name: ask for more, or give the new one a name of its own"
            )

    def begin(self, progress: Progress, steps_per_epoch: int | None) -> None:
        """Notes in ``progress`` how much is planned."""
        total, epochs = self.total_steps(steps_per_epoch), self.epochs
        progress.steps_per_epoch = steps_per_epoch
        progress.total_epochs = None if epochs is None else progress.first_epoch + epochs
        progress.total_steps = None if total is None else progress.first_step + total

    def total_steps(self, steps_per_epoch: int | None) -> int | None:
        """Returns how many global steps the fit is to have; None where nobody can know."""
        totals = [] if self.max_steps is None else [self.max_steps]
        if self.epochs is not None and steps_per_epoch is not None:
            totals.append(self.epochs * steps_per_epoch)
        return min(totals, default=None)

    def take_length(self, progress: Progress, steps_per_epoch: int | None) -> str:
        """Takes notice of how long the epoch is that begins; returns what to tell of a change."""
        before = progress.steps_per_epoch
        if steps_per_epoch is None or steps_per_epoch == before:
            return ""
        progress.steps_per_epoch = steps_per_epoch
        totals = [] if self.max_steps is None else [progress.first_step + self.max_steps]
        if progress.total_epochs is not None:
            done = progress.step - progress.step_in_epoch
            totals.append(done + (progress.total_epochs - progress.epoch) * steps_per_epoch)
        progress.total_steps = min(totals)
        return (
            f"note: epoch {progress.epoch} has {steps_per_epoch} steps, where {before} were "
            "planned: the data, or their order, has another length now. Schedules keep the plan "
            "that they were made for"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


class Recorder:
    """What a trial of a script (``dtrain check``, ``dtrain drill``) changes in a run, and is told.

    This one changes nothing.
    """

    saves = True  # whether checkpoints are made

    def plan(self, plan: Plan) -> Plan:
        """Returns how long to train; callbacks see the totals of the plan that is given."""
        return plan

    def samples_of(self, world: World) -> World:
        """Returns whose samples this rank trains on."""
        return world

    def report(self, report: Report) -> None:
        """Takes what sinks will be handed, on rank 0, as soon as it is known."""


@dataclass(frozen=True, slots=True)
class FitResult:
    """What ``fit`` returns. Equal on all ranks.

    Attributes:
        steps: global steps taken since the run began, over restarts and all fits so far.
        epochs: epochs finished, likewise.
        stop_reason: why it ended, in plain words.
        metrics: the newest agreed metrics, such as ``train/loss`` and ``eval/accuracy``.
        history: one dict a report of this call, with ``step`` and ``epoch``; at most as many as
            ``fit(history=...)`` says, the newest. An epoch's means are with its last report, as
            ``epoch/...``. Empty where the fit was over when this process began.
        preempted: the run was told to leave and is to be continued by another start.
        updates: steps whose update was applied: not one that a loss scale, a callback or every
            rank left out.
        last_checkpoint: the newest one's folder; None where there is none.
        best_checkpoint: that of the best by ``Checkpoint(best=...)``; None without.
    """

    steps: int
    epochs: int
    stop_reason: str
    metrics: dict[str, float]
    history: list[dict[str, float]]
    preempted: bool = False
    updates: int = 0
    last_checkpoint: Path | None = None
    best_checkpoint: Path | None = None

    @classmethod
    def of_earlier(cls, fit: Fit, last: Path | None, best: Path | None) -> "FitResult":
        """Returns what a fit has come to in an earlier process."""
        done = (fit.steps, fit.epochs, fit.reason)
        return cls(*done, dict(fit.metrics), [], False, fit.updates, last, best)

    @classmethod
    def of(
        cls,
        progress: Progress,
        metrics: dict[str, float],
        stop_reason: str,
        preempted: bool,
        history: list[dict[str, float]],
        last: Path | None,
        best: Path | None,
    ) -> "FitResult":
        """Returns what a fit has come to, which has come so far."""
        done, updates = (progress.step, progress.epoch, stop_reason), progress.updates
        return cls(*done, metrics, history, preempted, updates, last, best)
