"""What computes: the model and its loss, and what ranks need to meet in a step."""

import math
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
from dtrain.errors import ConfigError, LossError
from dtrain.metrics import Means, with_added
from dtrain.step.gather_with_grad import Gathers
from dtrain.step.lane import Lane, Verdict
from dtrain.step.micro_step import LossFn, MicroStep, as_loss
from dtrain.step.parameters import lacking, note_of
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
        self.epoch_sums: dict[str, list[float]] = {}  # since the epoch began: of means, and weights
        self.rates: list[Any] = []  # by group, the learning rates of the newest step
        self._evaluates = False
        self._warned_nonfinite = False

    def restart(self, weight: float) -> None:
        """Begins a fit on all ranks, whose steps weigh so much over all ranks; 0: nobody knows."""
        self.micro_step.restart(weight)
        self._means.drop()
        self.hooks.failed_in = ""
        self._warned_nonfinite = False

    def begin(self, *, first: bool) -> None:
        """Takes model and optimizer as a fit finds them. Ranks: all, communicates."""
        self.context.model.to(self.world.device)  # it may have been away
        self.micro_step.trained.check(begins=True)
        self.make_equal()
        if first:
            self.strategy.wrap(self.micro_step, self.world)
        else:
            self.strategy.refresh(begins=True)

    def make_equal(self) -> None:
        """Gives all ranks rank 0's model, should the script have changed it since, and says so.

        Ranks: all, communicates.
        """
        model, comm = self.context.model, self.world.comm
        check_same_model(model, comm)  # a verb: whoever failed before is met here
        share_buffers(model, comm)  # each rank's own until now, in some models
        if comm.vote("models differ", self.strategy.make_equal(model, self.world)):
            self.context.say(
                "note: the ranks' models were no longer equal; all have rank 0's now. Load or "
                "change weights on every rank alike."
            )

    # -- phases of a run: where this rank is, and what becomes of an exception ------------------

    def in_step(self, number: int) -> "_InStep":
        """A step: others may be anywhere, so a failure is left where they look for it."""
        return _InStep(self, number)

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
            self._loss_sum += (loss_sum := verdict.loss_mean * verdict.weight)
            self.counted += verdict.weight
            of_epoch = self.epoch_sums.setdefault("train/loss", [0.0, 0.0])
            of_epoch[0] += loss_sum
            of_epoch[1] += verdict.weight
        if verdict.nonfinite and not self._warned_nonfinite:
            self._warned_nonfinite = True
            context.say(f"warning: the loss is not finite at step {step.number}")
        if verdict.skipped:
            self.outbox.add("skipped", verdict.skipped / self.world.size, "sum")

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
        for name, (total, weight) in self._means.pairs.items():
            if name.startswith("train/"):
                sums = self.epoch_sums.setdefault(name, [0.0, 0.0])
                self.epoch_sums[name] = [sums[0] + total, sums[1] + weight]
        if straggler := self.clock.compare(values.pop(SECONDS_METRIC)):
            context.say(f"warning: {straggler}")
        if values:
            values |= self._learning_rates()
            values |= self.precision.values()
        return values

    def _learning_rates(self) -> dict[str, float]:
        """Returns each group's, by its name or number; the first's in any case as ``lr``."""
        rates: dict[str, float] = {}
        groups = self.context.optimizer.param_groups
        for number, (group, rate) in enumerate(zip(groups, self.rates, strict=False)):
            name = f"lr/{group.get('name', number)}"
            if rate is not None and not number:
                rates["lr"] = float(rate)
            if rate is not None and (number or "name" in group) and len(groups) > 1:
                rates[f"lr/{number}" if name in rates else name] = float(rate)
        return rates

    def end_epoch(self) -> dict[str, float]:
        """Returns figures of the epoch, as ``epoch/...``: NaN where only earlier ones had any."""
        sums, self.epoch_sums = self.epoch_sums, {name: [0.0, 0.0] for name in self.epoch_sums}
        means = {n: total / weight if weight else math.nan for n, (total, weight) in sums.items()}
        self.context._take(means)
        return {_of_epoch(name): mean for name, mean in means.items()}

    def restore_epoch(self, sums: dict[str, list[float]] | None) -> None:
        """Takes up an epoch's sums; None where older code saved none, and judged by the newest."""
        if sums is not None:
            self.epoch_sums = sums
        else:
            known = self.context.metrics
            known |= {_of_epoch(name): v for name, v in known.items() if name.startswith("train/")}

    # -- evaluation -----------------------------------------------------------------------------

    def evaluate(self, feeds: dict[str, Feed]) -> dict[str, float]:
        """Returns the metrics of each set, named after it, as in ``eval/loss``, and callbacks'.

        Every sample counts once, and all ranks get the same numbers. A hook may evaluate something
        else meanwhile; of that, no hooks fire. Ranks: all, communicates: buffers first, sums once
        at the end of each set, and whether callbacks left the same on all ranks.
        """
        if self._evaluates:
            return self._evaluate_sets(feeds)
        self._evaluates = True
        try:
            self.hooks.fire(Callback.on_eval_start, self.context)
            metrics = self._evaluate_sets(feeds)
            left = dict(metrics)
            self.hooks.fire(Callback.on_eval_end, self.context, left)
            any_left = self.hooks.has(Callback.on_eval_end)
            return with_added(metrics, left, self.context.comm) if any_left else metrics
        finally:
            self._evaluates = False

    def evaluate_apart(self, feeds: dict[str, Feed]) -> dict[str, float]:
        """The same as no part of a training: what hooks log or ask for meanwhile is forgotten."""
        context, outbox, request = self.context, self.outbox, self.context.request
        logged, pending, in_fit = outbox.logged, request.pending, context.in_fit
        outbox.logged, request.pending, context.in_fit = {}, {kind: [] for kind in pending}, False
        try:
            return self.evaluate(feeds)
        except BaseException as error:
            self.hooks.tell(context, error)
            raise
        finally:
            if in_fit:  # a signal's, which comes at any moment
                pending["preempt"] += request.pending["preempt"]
            outbox.logged, request.pending, context.in_fit = logged, pending, in_fit

    def _evaluate_sets(self, feeds: dict[str, Feed]) -> dict[str, float]:
        context = self.context
        share_buffers(context.model, context.comm)
        metrics: dict[str, float] = {}
        for label, feed in feeds.items():
            means = self._eval_means.setdefault(label, Means(label, context.device))
            means.drop()  # of an evaluation that failed
            with torch.no_grad(), _eval_mode(context.model):
                self._evaluate_set(feed, label, means)
            if mixed := means.shares_with(self._means):  # in the middle of a training's report
                raise LossError(
                    f"the torchmetrics object {mixed[0]!r} holds batches of the training, too: "
                    "evaluate at an epoch's end, or with other objects (an eval_fn)"
                )
            found = means.agree(context.comm)
            if twice := ", ".join(sorted(metrics.keys() & found.keys())):
                raise ConfigError(f"two figures of the evaluation are named {twice}")
            metrics |= found
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


class _InStep:
    """What :meth:`Engine.in_step` returns; a generator would take a microsecond more a step."""

    def __init__(self, engine: Engine, number: int) -> None:
        self._engine, self._number = engine, number

    def __enter__(self) -> None:
        comm = self._engine.context.comm
        comm.mark_step(self._number)
        self._engine.clock.begin_step()
        comm.activity.begin_step(self._number)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        engine, comm = self._engine, self._engine.context.comm
        if isinstance(error, Exception):
            comm.leave(error, engine.hooks.failed_in or "a training step")
        elif error is None:
            engine.clock.end_step()
            comm.activity.end_lap(BETWEEN)


def _of_epoch(name: str) -> str:
    return name.replace("train/", "epoch/", 1)


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
    made = optimizer if isinstance(optimizer, Optimizer) else optimizer(model)
    notes = [note] if (note := note_of(lacking(made, model))) else []
    check_same_model(model, world.comm)
    if world.comm.vote("models differ", strategy.make_equal(model, world)):
        notes.append(
            "the ranks' models were not equal; all have rank 0's now. Call "
            "dtrain.init(seed=...) before the model is made, and they are equal from the start."
        )
    return model, made, notes


def takes_a_veto(optimizer: Optimizer) -> bool:
    """Says whether the optimizer can be told on the device to change nothing, as fused ones can."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
