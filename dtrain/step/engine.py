"""What computes: the model and its loss, and what ranks need to meet in a step."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.callback import Callback, Hooks
from dtrain.context import Context, Loss, Outbox, Step
from dtrain.data import EndOfStream, Feed
from dtrain.distributed import (
    BETWEEN,
    EVAL_LOSS_FN,
    EVALUATION,
    Phase,
    World,
    check_same_model,
    share_buffers,
)
from dtrain.errors import ConfigError
from dtrain.metrics import Means
from dtrain.step.gather_with_grad import Gathers
from dtrain.step.lane import Lane, Verdict
from dtrain.step.loss_words import explain
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
    eval_fn: LossFn  # the same; gets the bare model, in eval mode, without gradients
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
        self._eval_gathers = Gathers(comm, rank, size)
        self._eval_means: dict[str, Means] = {}  # kept: ranks agree on names only once
        self._loss_sum = self.counted = 0.0  # since the last report: loss and weight, both agreed
        self._warned_nonfinite = False

    def restart(self, weight: float) -> None:
        """Begins a fit on all ranks, whose steps weigh so much over all ranks; 0: nobody knows."""
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
        """Ranks meet in the verbs of Comm only, so a failure reaches all of them in the next."""
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
            self.counted += verdict.weight
        if verdict.nonfinite and not self._warned_nonfinite:
            self._warned_nonfinite = True
            context.say(f"warning: the loss is not finite at step {step.number}")
        if verdict.skipped:
            context.log("skipped", verdict.skipped / self.world.size, "sum")

    def agree_figures(self) -> dict[str, float]:
        """Returns figures since the last report; tells of a straggler. Ranks: all, communicates."""
        context = self.context
        for name, logged in self.outbox.logged.items():
            self._means.add_logged(name, logged.values, logged.reduce)
        self.outbox.logged.clear()
        values = {"train/loss": self._loss_sum / self.counted} if self.counted else {}
        self._loss_sum = self.counted = 0.0
        self._means.add(SECONDS_METRIC, self.clock.seconds, 1)
        values |= self._means.agree(context.comm)
        if straggler := self.clock.compare(values.pop(SECONDS_METRIC)):
            context.say(f"warning: {straggler}")
        if values:
            values["lr"] = float(context.optimizer.param_groups[0]["lr"])
            values |= self.precision.values()
        return values

    # -- evaluation -----------------------------------------------------------------------------

    def evaluate(self, feeds: dict[str, Feed]) -> dict[str, float]:
        """Returns the metrics of each set, named after it, as in ``eval/loss``.

        Every sample counts once, and all ranks get the same numbers. Ranks: all, communicates:
        buffers first, sums once at the end of each set.
        """
        context = self.context
        share_buffers(context.model, context.comm)
        metrics: dict[str, float] = {}
        for label, feed in feeds.items():
            means = self._eval_means.setdefault(label, Means(label, context.device))
            means.drop()  # of an evaluation that failed
            with torch.no_grad(), _eval_mode(context.model):
                self._evaluate_set(feed, label, means)
            metrics |= means.agree(context.comm)
        return metrics

    def _evaluate_set(self, feed: Feed, label: str, means: Means) -> None:
        context, comm, activity = self.context, self.context.comm, self.context.comm.activity
        activity.restart_batches()
        for number, micro_batches in enumerate(feed.epoch(0, 0)):
            step = Step(number=number, micros=micro_batches.micros)
            ended = False
            for micro in range(step.micros):
                step.micro, step.loss = micro, None
                activity.begin_batch()
                try:
                    fetched = None if ended else micro_batches.next()
                except EndOfStream:
                    fetched, ended = None, True
                if fetched is not None:
                    step.batch, step.samples = fetched
                    activity.enter(EVAL_LOSS_FN)
                    comm.serve_gathers(self._eval_gathers)
                    try:
                        with self.precision.autocast():
                            returned = self.eval_fn(context.model, step.batch, context)
                    except Exception as error:
                        explain(error)
                        raise
                    finally:
                        comm.serve_gathers(None)
                    step.loss = loss = as_loss(returned, step.samples)
                    assert loss.weight is not None
                    means.add(f"{label}/loss", loss.mean, loss.weight)
                    for name, value in loss.metrics.items():
                        means.add(f"{label}/{name}", value, loss.weight)
                    self.hooks.fire(Callback.on_eval_batch, context, step)
                done = self._eval_gathers.finish(completed=step.loss is not None, ended=ended)
                activity.end_lap(EVALUATION)
            # Where loss functions gather, a rank whose stream has ended waits for the others.
            if ended and all(one.ended for one in done):
                break

    # -- what computes for hooks; see :class:`dtrain.Context` -----------------------------------

    def loss_of(self, ctx: Context, batch: Any) -> Loss:
        with self.precision.autocast():
            return as_loss(self.loss_fn(ctx.model, batch, ctx), 1)

    def gradients(self) -> list[Tensor]:
        return self.strategy.gradients(self.context.optimizer)

    def gradient_norm(self) -> Tensor:
        return self.strategy.gradient_norm(self.context.optimizer)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts every submodule in eval mode, and each back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        # Not `model.train()`: that would wake parts that the user keeps in eval mode.
        for module in training:
            module.training = True


def take_model(
    model: nn.Module,
    optimizer: Optimizer | Callable[[nn.Module], Optimizer],
    strategy: Strategy,
    world: World,
) -> tuple[nn.Module, Optimizer, list[str]]:
    """Returns the model as it is trained, its optimizer, and what to tell the user of them.

    Ranks: all, communicates.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("no parameter of the model requires a gradient: nothing to train")
    model = strategy.prepare_model(model.to(world.device), world)
    made = _made(optimizer, model)
    notes = _check_optimizer(made, model)
    check_same_model(model, world.comm)
    if world.comm.vote("models differ", strategy.make_equal(model, world)):
        notes.append(
            "the ranks' models were not equal; all have rank 0's now. Call "
            "dtrain.init(seed=...) before the model is made, and they are equal from the start."
        )
    return model, made, notes


def _made(given: Any, model: nn.Module) -> Any:
    """Returns the optimizer, made by the function if one is given; raises ConfigError if it cannot.

    It need not be one; see `_check_optimizer`.
    """
    kind = getattr(given, "func", given)  # a class, or a partial one
    if isinstance(kind, type) and issubclass(kind, Optimizer):
        raise ConfigError(
            f"the optimizer is {given!r}, which takes parameters, not a model: pass "
            f"`lambda m: {kind.__name__}(m.parameters(), ...)`"
        )
    made = given
    if callable(given) and not isinstance(given, Optimizer):
        try:
            made = given(model)
        except Exception as error:
            error.add_note(f"(while the optimizer was made: {given!r} was called with the model)")
            raise
    if isinstance(made, list | tuple | dict):
        parts = made.values() if isinstance(made, dict) else made
        raise ConfigError(
            f"the optimizer is several ({', '.join(type(one).__name__ for one in parts)}), and a "
            "Trainer steps one: give it groups of parameters, such as AdamW([{'params': ..., "
            "'lr': ...}, ...]). A scheduler is a callback: dtrain.callbacks.LRSchedule"
        )
    return made


def _check_optimizer(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Returns what to tell the user of it; raises ConfigError where it is of another model."""
    ours = {id(p) for p in model.parameters()}
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"the optimizer is {optimizer!r}, no torch.optim.Optimizer")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(
            f"{type(optimizer).__name__} cannot be used yet: its step evaluates the loss several "
            "times, by a closure, and a Trainer takes one gradient a step. Use another optimizer"
        )
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strange = [p for p in held if id(p) not in ours]
    if strange:
        shapes = ", ".join(str(list(p.shape)) for p in strange[:5])
        raise ConfigError(
            f"{len(strange)} of the optimizer's {len(held)} parameters are not the model's (shapes "
            f"{shapes}). Make the optimizer from this model, after its last change; or pass a "
            "function: Trainer(model, lambda m: AdamW(m.parameters()), ...)"
        )
    ids = {id(p) for p in held}
    left = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ids]
    if not left:
        return []
    shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
    return [f"note: the optimizer does not have {shown}, which require a gradient"]


def takes_a_veto(optimizer: Optimizer) -> bool:
    """Says whether the optimizer can be told on the device to change nothing, as fused ones can."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
