"""What computes: the model and its loss, and what ranks need to meet in a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dtrain.callback import Hooks
from dtrain.context import Context, Loss, Outbox, Step
from dtrain.distributed import BETWEEN, Phase, World
from dtrain.metrics import Means
from dtrain.step.evaluation import Evaluation
from dtrain.step.gather_with_grad import Gathers
from dtrain.step.lane import Lane, Verdict
from dtrain.step.micro_step import LossFn, MicroStep, as_loss
from dtrain.step.precision import Precision
from dtrain.step.strategy import Strategy
from dtrain.step.votes import Agreement
from dtrain.watchdog import SECONDS_METRIC, StragglerClock


@dataclass(eq=False)
class Engine:
    """The parts of a step, made once for all of a Trainer's fits.

    It tells the watchdog and the stragglers' clock where this rank is, and others why it failed;
    and it adds up training figures from one report to the next.

    Ranks: all; local where a method does not say otherwise.
    """

    context: Context
    outbox: Outbox  # what hooks have said
    world: World
    loss_fn: LossFn  # with three arguments; see `adapt`
    eval_fn: LossFn
    precision: Precision
    strategy: Strategy
    hooks: Hooks

    def __post_init__(self) -> None:
        context, hooks, precision = self.context, self.hooks, self.precision
        rank, size, comm = self.world.rank, self.world.size, self.world.comm
        shares = 1 if precision.scales_loss else size
        self.lane = Lane(context.model, rank=rank, size=size, shares=shares)
        self.agreement = Agreement(context.request, comm, self.world.host)
        self.clock = StragglerClock(comm, host=self.world.host, size=size)
        self._means = Means("train", context.device, names=[SECONDS_METRIC])
        self.micro_step = MicroStep(
            context=context,
            loss_fn=self.loss_fn,
            lane=self.lane,
            precision=precision,
            hooks=hooks,
            agreement=self.agreement,
            gathers=Gathers(comm, rank, size),
            means=self._means,
            clock=self.clock,
            find_unused=self.strategy.find_unused,
            may_idle=self.strategy.may_idle,
        )
        gathers = Gathers(comm, rank, size)
        self.evaluate = Evaluation(self.eval_fn, gathers, hooks, precision, context).run
        self._loss_sum = self._weight = 0.0  # agreed, since the last report
        self._warned_nonfinite = False

    def restart(self, weight: float) -> None:
        """Begins a fit whose steps are expected to weigh that, over all ranks; 0: nobody knows.

        Ranks: all, local; must be called on all ranks.
        """
        self.micro_step.restart(weight)
        self._means.drop()
        self.hooks.failed_in = ""
        self._warned_nonfinite = False

    # -- phases of a run: where this rank is, and what becomes of an exception ------------------

    @contextmanager
    def in_step(self, number: int) -> Iterator[None]:
        """A step: others may be anywhere, so a failure is left where they look for it."""
        comm = self.context.comm
        comm.mark_step(number)
        self.clock.begin_step()
        comm.activity.begin_step(number)
        with comm.alone(lambda: self.hooks.failed_in or "a training step"):
            yield
        self.clock.end_step()
        comm.activity.end_lap(BETWEEN)

    @contextmanager
    def together(self, phase: Phase) -> Iterator[None]:
        """Ranks meet in the verbs of Comm only, so a failure reaches all of them in the next.

        Ranks: all, local; communicates where the block raises.
        """
        comm = self.context.comm
        comm.activity.enter(phase)
        with comm.lockstep(lambda: self.hooks.failed_in or phase.name):
            yield
        comm.activity.enter(BETWEEN)

    # -- training figures, from one report to the next ------------------------------------------

    def count(self, step: Step, verdict: Verdict) -> None:
        """Counts a step, of which all ranks know now what became."""
        context = self.context
        context.progress.samples += verdict.samples
        self.lane.observe(verdict)
        # A step that was left out for its loss must not make the whole report's loss NaN.
        if verdict.weight > 0 and not (step.vetoed and verdict.nonfinite):
            self._loss_sum += verdict.loss_mean * verdict.weight
            self._weight += verdict.weight
        if verdict.nonfinite and not self._warned_nonfinite:
            self._warned_nonfinite = True
            context.say(f"warning: the loss is not finite at step {step.number}")
        if verdict.skipped:
            context.log("skipped", verdict.skipped / self.world.size, "sum")

    @property
    def has_figures(self) -> bool:
        """Whether a step has counted since the last report; equal on all ranks."""
        return bool(self._weight)

    def agree_figures(self) -> dict[str, float]:
        """Returns figures since the last report; says who holds up the others, if somebody does.

        Ranks: all, communicates.
        """
        context = self.context
        for name, logged in self.outbox.logged.items():
            self._means.add_logged(name, logged.values, logged.reduce)
        self.outbox.logged.clear()
        values = {"train/loss": self._loss_sum / self._weight} if self._weight else {}
        self._loss_sum = self._weight = 0.0
        self._means.add(SECONDS_METRIC, self.clock.seconds, 1)
        values |= self._means.agree(context.comm)
        if straggler := self.clock.compare(values.pop(SECONDS_METRIC)):
            context.say(f"warning: {straggler}")
        if values:
            values["lr"] = float(context.optimizer.param_groups[0]["lr"])
            values |= self.precision.values()
        return values

    # -- what computes for hooks; see :class:`dtrain.Context` -----------------------------------

    def loss_of(self, ctx: Context, batch: Any) -> Loss:
        with self.precision.autocast():
            return as_loss(self.loss_fn(ctx.model, batch, ctx), 1)

    def gradients(self) -> list[Tensor]:
        return self.strategy.gradients(self.context.optimizer)

    def gradient_norm(self) -> Tensor:
        return self.strategy.gradient_norm(self.context.optimizer)
