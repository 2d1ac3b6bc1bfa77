"""What computes: the model and its loss, and what ranks need to meet in a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from operator import methodcaller
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain import accelerator
from dtrain.callback import Callback, Hooks
from dtrain.context import Context, Loss, Outbox, Step, has_updates, kind_of, needs_closure
from dtrain.distributed import (
    BETWEEN,
    UPDATE,
    Phase,
    Replicas,
    StreamsOfFits,
    World,
    are_equal,
    check_same_model,
    share_buffers,
)
from dtrain.errors import ConfigError
from dtrain.step.closures import Closures
from dtrain.step.device_lane import make_lane
from dtrain.step.evaluation import Evaluation
from dtrain.step.figures import Figures
from dtrain.step.gather_with_grad import Gathers
from dtrain.step.gradients import Gradients
from dtrain.step.graphed import Graphed
from dtrain.step.lane import Lane
from dtrain.step.loss_forms import LossFn, as_loss
from dtrain.step.memory_words import explain_memory
from dtrain.step.micro_step import MicroStep
from dtrain.step.modes import Modes
from dtrain.step.precision import Order, Precision, fresh_casts
from dtrain.step.stand_in import StandIn
from dtrain.step.strategy import Gate, Strategy
from dtrain.step.updates import Update, UpdatePlan, Updates
from dtrain.step.votes import Agreement
from dtrain.watchdog import StragglerClock

_RATE = methodcaller("get", "lr")


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
    replicas: Replicas
    keep_modes: bool  # the user means the modes that the model is in
    graph: bool = False  # micro-steps are captured
    plan: UpdatePlan | None = None  # which updates a step has, of several optimizers

    def __post_init__(self) -> None:
        context, hooks, precision = self.context, self.hooks, self.precision
        world, outbox, comm = self.world, self.outbox, self.world.comm
        names = [str(key) for key in context.optimizers] if has_updates(context.optimizer) else []
        if self.plan is not None and not names:
            raise ConfigError("Trainer(updates=...) is for named optimizers: optimizer={'a': ...}")
        if self.graph and names:
            raise ConfigError("Trainer(graph=True) cannot capture a loss function that yields")
        # What becomes of an update is waited for before the next one of the same step begins.
        context.reads_at_once = accelerator.of(self.world.device) is None or bool(names)
        self.seat = seat = context._seat = self.strategy.samples_of(self.world)
        shares = 1 if precision.scales_loss else seat.size
        lanes = {name: make_lane(context.model, seat, shares) for name in names or [""]}
        self.agreement = Agreement(context.request, comm, self.world.host)
        self.stand_in = StandIn(context, hooks.callbacks)
        self.clock = StragglerClock(comm, host=world.host, size=world.size)
        self.figures = Figures(context, outbox, seat, lanes, precision, self.replicas, self.clock)
        parts = {name: self._part(name, lane) for name, lane in lanes.items()}
        self.parts, self.updates = (*parts.values(),), None
        self._take(self.parts[0])
        if names:
            take = WeakMethod(self._take)
            self.updates = Updates(context, self.loss_fn, precision, self.plan, parts, take)
        self.closures: Closures | None = None
        if needs_closure(context.optimizer):
            if precision.scales_loss or self.graph:
                raise ConfigError(
                    f"{kind_of(context.optimizer)} evaluates the loss several times in a step, "
                    "which neither a loss scale (fp16) nor graph=True allows"
                )
            self.closures = Closures(context, self.loss_fn, precision, hooks, self.parts[0])
        self.graphed: Graphed | None = None
        if self.graph:
            trained, device = self.micro_step.trained, accelerator.of(self.world.device)
            self.graphed = Graphed(context, self.loss_fn, precision, trained, device)
            self.micro_step.computed = self.graphed
            self.micro_step.backward = self.graphed.backward
        self.modes = Modes(context.model, context.say, keep=self.keep_modes)
        self.streams = StreamsOfFits()
        how = precision, hooks, self.figures.means, self.strategy
        self.evaluation = Evaluation(context, outbox, seat, self.eval_fn, *how)
        for part in self.parts:
            part.strategy.take(part.micro_step, world)
        self._wrapped = self.parted = False  # a fit has begun; a step ended by a failure here only
        hooks.carry = WeakMethod(self.carry)

    def _part(self, name: str, lane: Lane) -> Update:
        """Returns what the gradients of one optimizer meet by; of the only one, without a name."""
        context, comm = self.context, self.world.comm
        strategy = copy(self.strategy) if name else self.strategy
        micro_step = MicroStep(
            context=context,
            loss_fn=self.loss_fn,
            lane=lane,
            precision=self.precision,
            hooks=self.hooks,
            agreement=self.agreement,
            gathers=Gathers(comm, self.world.rank, self.world.size, strategy.no_gathers),
            means=self.figures.means,
            clock=self.clock,
            find_unused=strategy.find_unused,
            may_idle=strategy.may_idle,
            update=name,
        )
        # Fused optimizers take a number of 32 bits.
        may_wait = lane.param.dtype == torch.float32 and self.hooks.all_ask_for_gradients()
        at_once = context.reads_at_once
        gradients = Gradients(
            strategy, self.precision, may_wait=may_wait and not at_once, on_host=at_once
        )
        return Update(strategy, lane, micro_step, gradients)

    def _take(self, part: Update) -> None:
        """Has it be the turn of one of several updates, until another is taken."""
        self.strategy, self.lane = part.strategy, part.lane
        self.micro_step, self._gradients = part.micro_step, part.gradients

    def restart(self, weight: float) -> None:
        """Begins a fit on all ranks, whose steps weigh so much over all ranks; 0: nobody knows."""
        for part in self.parts:
            part.micro_step.restart(weight)
        if self.graphed is not None:
            self.graphed.restart()
        self.figures.restart()
        self.hooks.failed_in = ""

    def begin(self) -> None:
        """Takes model and optimizer as a fit finds them. Ranks: all, communicates."""
        self.strategy.bring_home(self.context.model, self.world)
        now = self.context.optimizer
        names = [*self.context.optimizers] if has_updates(now) else [""]
        if {*names} != {part.micro_step.update for part in self.parts}:
            raise ConfigError(
                f"trainer.optimizer was set to others ({kind_of(now)}): make a Trainer"
            )
        for part in self.parts:
            part.micro_step.trained.check(begins=True)
        self.make_equal()
        first, self._wrapped = not self._wrapped, True
        # A later fit's first epoch looks what to wrap anew.
        for part in self.parts if first else ():
            part.strategy.wrap(part.micro_step, self.world)

    def shares(self) -> dict[str, int]:
        """Returns among how many samples are shared out, and how many ranks each of them is."""
        return {"ranks": self.seat.size, "each": self.world.size // self.seat.size}

    def make_equal(self) -> None:
        """Gives all ranks rank 0's model, should the script have changed it since, and says so.

        Ranks: all, communicates.
        """
        model, comm = self.context.model, self.world.comm
        # A verb: whoever failed before is met here. Mostly nothing has changed.
        if self.world.size > 1 and are_equal(model, comm):
            return
        check_same_model(model, comm)
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
            if self.agreement.trouble is not None:
                self.hooks.failed_in = self.agreement.trouble[1]
                raise self.agreement.trouble[0]
            yield
        comm.activity.enter(BETWEEN)

    def carry(self, error: Exception) -> None:
        """Has all ranks raise what a hook, or the optimizer, raised on this one beside a reduction.

        They do so in the next reduction, or where they meet next. Raises it where that cannot be.
        """
        comm, where = self.context.comm, self.hooks.failed_in or UPDATE.name
        all_know = comm.is_told(error) or comm.may_be_broken(error)
        # Alone, a rank raises at once; but where nothing of a step was done, that one is left, and
        # what was before it is saved, as where a loss function fails.
        alone = self.world.size == 1 and where != "on_step_start"
        if alone or all_know or not self.strategy.may_idle:
            try:
                raise error
            finally:
                del error  # its traceback has this frame
        if self.agreement.trouble is None:
            comm.record(error, where)  # for ranks that wait for this one in a verb of their hooks
            self.parted |= where != "on_step_start"
            try:
                self.micro_step.fail(error, where)
            finally:
                del error

    def update(self, step: Step, gate: Gate) -> bool | Tensor:
        """Updates the parameters by the gradient of the global mean; returns whether it was not."""
        context, precision = self.context, self.precision
        optimizer = context.optimizers[step.update] if step.update else context.optimizer
        context.comm.activity.enter(UPDATE)
        if step.update and step.result is not None:
            step.done = (*step.done, (step.update, step.result))
        self._gradients.take(optimizer, gate)
        self.hooks.fire(Callback.on_grads_ready, context, step)
        if step.ends:
            rates = [*map(_RATE, context.optimizer.param_groups)]
            if Tensor in map(type, rates):  # its owner writes the next step's into it
                rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]
            self.figures.rates = rates
        closed, held = gate.closed, step.held
        if held is not None and gate.waits:
            closed, held = closed or float(held) > 0, None
        elif held is not None:
            held = step.one_flag()
        left = self._gradients.divisor
        divisor = None if left is None else self._gradients.number_of(left)
        blocked: bool | Tensor = True
        try:
            if step.vetoed:
                precision.skip()
            else:
                stepped = optimizer
                if self.closures is not None:
                    stepped = self.closures.of(step, optimizer, self.raise_failures)
                blocked = precision.step(stepped, Order(closed, held, divisor, gate.waits))
        except Exception as error:  # noqa: BLE001 -- every rank learns of it
            if "closure" in str(error) or "'NoneType' object is not callable" in str(error):
                error.add_note(
                    f"(if {type(optimizer).__name__} evaluates the loss again, pass the Trainer "
                    "dtrain.WithClosure(optimizer))"
                )
            self.carry(error)
        if step.update and step.ends:
            self._end_updates()
        return blocked

    def ahead(self) -> str:
        """Returns in words which updates come next, which must be equal on all ranks."""
        return "" if self.updates is None else self.updates.ahead()

    def raise_failures(self, step: Step) -> None:
        """Raises what any rank has failed by in a step, and says what of it was applied."""
        try:
            error, where = self.agreement.trouble or (None, "")
            self.context.comm.raise_failures("failures in a step", error, where)
        except Exception as error:
            if step.replayed:
                error.add_note(
                    f"(the update of step {step.number} was under way: there is no state before it "
                    "any more, and none is saved for resume='emergency')"
                )
            elif step.counted:
                names = ", ".join(repr(name) for name, result in step.done if result.applied)
                error.add_note(
                    f"(of step {step.number}, the update {names} was applied before update "
                    f"{step.update!r} failed: there is no state before the step any more, and none "
                    "is saved for resume='emergency')"
                )
            raise

    def _end_updates(self) -> None:
        """Has the loss functions go on after a step's last update; an error is as a hook's."""
        assert self.updates is not None
        try:
            self.updates.finish()
        except Exception as error:  # noqa: BLE001 -- every rank learns of it
            self.hooks.failed_in = "loss_fn"
            self.carry(error)

    def expected(self) -> Any:
        """Returns what steps are expected to weigh, for checkpoints; 0 where nobody knows yet."""
        each = {
            part.micro_step.update: part.lane.expected if part.micro_step.weighed else 0.0
            for part in self.parts
        }
        return each if self.updates else each[""]

    def expect(self, saved: Any) -> None:
        """Takes up what :meth:`expected` returned."""
        for part in self.parts:
            name = part.micro_step.update
            if weight := saved.get(name) if isinstance(saved, dict) else saved:
                part.lane.expect(weight)
                part.micro_step.weighed = True

    # -- what a fit leaves as it found it ------------------------------------

    @contextmanager
    def in_fit(self) -> Iterator[None]:
        """A fit: random streams and modes are then as before, and weights are cast as they are.

        Raises ConfigError within another one of the same Trainer.
        """
        if self.context.in_fit:
            raise ConfigError(
                "fit was called in a hook or a loss function of this Trainer's own fit: call it "
                "when that has returned, or use another Trainer"
            )
        self.context.in_fit = True
        try:
            with self.streams, self.modes.in_fit(), fresh_casts():
                yield
        finally:
            self.context.in_fit = False
            self.agreement.trouble = None  # its frames hold all this
            if self.graphed is not None:
                self.graphed.restart()  # the memory is free for something else

    # -- what computes for hooks; see :class:`dtrain.Context` -----------------------------------

    def loss_of(self, ctx: Context, batch: Any) -> Loss:
        def look() -> Loss:
            returned = self.loss_fn(ctx.model, batch, ctx)
            return as_loss(self.updates.replayed(returned) if self.updates else returned, 1)

        with self.precision.autocast():
            return self.strategy.look(look, batch)

    def gradients(self, optimizer: Optimizer | None) -> list[Tensor]:
        if not self.context.reads_at_once:  # else nothing is left to be done to them
            every = self._gradients.tensors()
            return every if optimizer is None else self.strategy.gradients(optimizer)
        return self.strategy.gradients(optimizer or self._gradients.optimizer)

    def gradient_norm(self) -> Tensor:
        return self._gradients.norm()

    def gradient_check(self) -> Tensor:
        return self._gradients.check()

    def clip_gradient_norm(self, max_norm: float) -> Tensor:
        return self._gradients.clip(max_norm)


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
            where = engine.hooks.failed_in or comm.activity.phase.name
            explain_memory(error, where, engine.micro_step.under_way, engine)
            comm.leave(error, engine.hooks.failed_in or "a training step")
        elif error is None:
            engine.clock.end_step()
            comm.activity.end_lap(BETWEEN)
        engine.micro_step.under_way = None  # its batch may be large
