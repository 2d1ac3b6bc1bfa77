"""What computes: the model and its loss, and what ranks need to meet in a step."""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.callback import Hooks
from dtrain.context import Context, Loss, Outbox, Step
from dtrain.distributed import Comm, World
from dtrain.metrics import Means
from dtrain.step.evaluation import Evaluation
from dtrain.step.figures import Figures
from dtrain.step.gather_with_grad import Gathers
from dtrain.step.lane import Lane, Verdict
from dtrain.step.micro_step import LossFn, MicroStep, as_loss
from dtrain.step.phases import Phases
from dtrain.step.precision import Precision
from dtrain.step.strategy import Strategy
from dtrain.step.votes import Agreement
from dtrain.watchdog import SECONDS_METRIC, StragglerClock


class Engine:
    """The parts of a step, made once for all of a Trainer's fits.

    Args:
        model: the user's module, on its device.
        optimizer: of its parameters.
        loss_fn: with three arguments; see :func:`adapt`.
        eval_fn: the same, for evaluation.
        precision, strategy, hooks, context: what a step is made with.
        outbox: what hooks have said.
        world: the ranks.

    Ranks: all; local where a method does not say otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss_fn: LossFn,
        eval_fn: LossFn,
        precision: Precision,
        strategy: Strategy,
        hooks: Hooks,
        context: Context,
        outbox: Outbox,
        world: World,
    ) -> None:
        rank, size, comm = world.rank, world.size, world.comm
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.strategy = strategy
        self.hooks = hooks
        self.lane = Lane(model, rank=rank, size=size, shares=1 if precision.scales_loss else size)
        self.agreement = Agreement(context.request, comm, world.host)
        self.clock = StragglerClock(comm, host=world.host, size=size)
        self.phases = Phases(comm, hooks, self.clock)
        self._means = Means("train", world.device, names=[SECONDS_METRIC])
        self.figures = Figures(self._means, outbox, self.clock)
        self.micro_step = MicroStep(
            model,
            loss_fn,
            self.lane,
            precision=precision,
            hooks=hooks,
            context=context,
            agreement=self.agreement,
            gathers=Gathers(comm, rank=rank, size=size),
            clock=self.clock,
            means=self._means,
            find_unused=strategy.find_unused,
            may_idle=strategy.may_idle,
        )
        gathers = Gathers(comm, rank=rank, size=size)
        self.evaluate = Evaluation(eval_fn, gathers, hooks, precision, world.device).run
        self._loss_fn = loss_fn
        self._size = size
        self._warned_nonfinite = False

    def restart(self, weight: float) -> None:
        """Begins a fit.

        Args:
            weight: what a step is expected to weigh, over all ranks; 0 where nobody knows.

        Ranks: all, local; must be called on all ranks.
        """
        self.micro_step.restart(weight)
        self._means.drop()
        self.hooks.failed_in = ""
        self._warned_nonfinite = False

    def count(self, step: Step, verdict: Verdict, context: Context) -> None:
        """Counts a step, of which all ranks know now what became."""
        context.progress.samples += verdict.samples
        self.lane.observe(verdict)
        self.figures.count(step, verdict)
        if verdict.nonfinite and not self._warned_nonfinite:
            self._warned_nonfinite = True
            context.say(f"warning: the loss is not finite at step {step.number}")
        if verdict.skipped:
            context.log("skipped", verdict.skipped / self._size, "sum")

    def raise_failures(self, comm: Comm) -> None:
        """Raises on every rank: the lane said that some rank failed; nothing was updated.

        Ranks: all, communicates.
        """
        error, where = self.micro_step.trouble or (None, "")
        comm.raise_failures("failures in a step", error, where)

    # What computes for hooks; see :class:`dtrain.Context`.

    def loss_of(self, ctx: Context, batch: Any) -> Loss:
        """Runs the loss function on a batch, as training would."""
        with self.precision.autocast():
            return as_loss(self._loss_fn(self.model, batch, ctx), 1)

    def gradients(self) -> list[Tensor]:
        """Returns tensors that hold all gradients, and otherwise zeros only."""
        return self.strategy.gradients(self.optimizer)

    def gradient_norm(self) -> Tensor:
        """Returns the joint norm of all gradients, 0-dim."""
        return self.strategy.gradient_norm(self.optimizer)
