"""A step of several updates: an optimizer, a reduction and a verdict for each.

The loss function is a generator that yields each update's loss. One is under way for each
micro-batch, and all of them are advanced in turn: so an update runs over all micro-batches before
the next one begins, and what a function has computed stays at hand for its later updates.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Protocol
from weakref import WeakMethod

from dtrain.context import Context, Loss, Progress, Step
from dtrain.data import MicroBatch, MicroBatches
from dtrain.errors import ConfigError, LossError
from dtrain.step.gradients import Gradients
from dtrain.step.lane import Lane
from dtrain.step.loss_forms import LossFn, as_loss
from dtrain.step.micro_step import MicroStep
from dtrain.step.precision import Precision
from dtrain.step.strategy import Strategy

#: Which updates a step has, in order; equal on all ranks.
UpdatePlan = Callable[[Progress], Sequence[str]]

_AHEAD = 64  # steps of a plan that ranks compare as a fit begins
_END, _FLAG, _VERSION = object(), attrgetter("requires_grad"), attrgetter("_version")
_SWITCHED = (
    "note: the loss function switched requires_grad, which holds up to its next yield only. It "
    "need not: an update reaches its own optimizer's parameters. To freeze some, do it in a hook"
)
_CHANGED = (
    "warning: the loss function changes parameters, which it does once for each micro-batch, and "
    "not on a rank without a batch, whose model then differs. Do it in a hook: on_step_end"
)


@dataclass(frozen=True, eq=False, slots=True)
class Update:
    """What the gradients of one optimizer meet by."""

    strategy: Strategy
    lane: Lane
    micro_step: MicroStep
    gradients: Gradients


@dataclass(slots=True)
class _Open:
    """The loss function of a micro-batch, in the middle of a step."""

    generator: Generator[Any, None, None]
    batch: Any
    samples: int
    yielded: list[str] = field(default_factory=list)


@dataclass(eq=False)
class Updates:
    """Whose turn it is in a step, and the loss functions that are under way. Ranks: all, local."""

    context: Context
    loss_fn: LossFn
    precision: Precision
    plan: UpdatePlan | None  # each optimizer once, in order, if None
    parts: dict[str, Update]  # by the name of the optimizer
    #: Makes one the engine's. Weak: that holds this.
    take: Callable[[], Callable[[Update], None] | None]

    def __post_init__(self) -> None:
        self._names: tuple[str, ...] = ()  # of the step's updates
        self._open: dict[int, _Open] = {}  # by micro-batch; only those that this rank has
        self._now = ""
        self._told: set[str] = set()
        for part in self.parts.values():
            part.micro_step.computed = weakly(self._advance)

    def planned(self, progress: Progress) -> tuple[str, ...]:
        """Returns which updates a step has; raises ConfigError where it can have no such."""
        if self.plan is None:
            return (*self.parts,)
        given: Any = self.plan(progress)
        names = tuple(given) if isinstance(given, Sequence) else ()
        if not names or isinstance(given, str) or not all(name in self.parts for name in names):
            raise ConfigError(
                f"Trainer(updates=...) returned {given!r} for step {progress.step}: a tuple of the "
                f"optimizers' names, at least one of {', '.join(map(repr, self.parts))}"
            )
        return names

    def ahead(self) -> str:
        """Returns the plan of the next steps, in words: must be equal on all ranks."""
        now = self.context.progress
        steps = [replace(now, step=now.step + i) for i in range(_AHEAD if self.plan else 1)]
        return "; ".join(", ".join(self.planned(step)) for step in steps)

    def turns(self, step: Step, feed: MicroBatches) -> Iterator[MicroBatches]:
        """Yields what feeds each of a step's updates, whose turn it is until the next."""
        self._names = self.planned(self.context.progress)
        activity = self.context.comm.activity
        try:
            for place, name in enumerate(self._names):
                self._now = step.update = name
                step.ends = place == len(self._names) - 1
                if place:
                    step.counted = any(result.applied for _, result in step.done)
                    step.vetoed, step.held, step._flags = "", None, 0
                part = self.parts[name]
                if not (part.micro_step.trainable or part.micro_step.trained.mine()):
                    raise ConfigError(
                        f"step {step.number} has update {name!r}, and every parameter of that "
                        "optimizer is frozen: leave the update out, by Trainer(updates=...)"
                    )
                take = self.take()
                assert take is not None
                take(part)
                yield Again(self, feed.micros) if place else feed
                part.micro_step.under_way = None
                activity.pass_on()
        finally:
            self._open = {}

    def _advance(self, step: Step) -> Loss:
        """Runs a micro-batch's loss function up to its next loss, which is this update's."""
        one = self._open.get(step.micro)
        if one is None:
            made = _started(self.loss_fn, self.context.model, step.batch, self.context)
            one = self._open[step.micro] = _Open(made, step.batch, step.samples)
        yielded = self._next(one)
        if _name_of(one, yielded) != step.update:
            raise self._differs(one)
        return as_loss(yielded[1], step.samples, trains=True)

    def _next(self, one: _Open) -> Any:
        """Runs a loss function on to what it yields next, or to its end.

        A network that it has frozen meanwhile, as is usual elsewhere, is as before then: on a rank
        without a batch nobody has frozen it.
        """
        params = self.parts[self._now].micro_step.trained.params
        flags, versions = [*map(_FLAG, params)], [*map(_VERSION, params)]
        try:
            with self.precision.autocast():
                return next(one.generator, _END)
        finally:
            if [*map(_FLAG, params)] != flags:
                for p, flag in zip(params, flags, strict=True):
                    p.requires_grad_(flag)
                self._tell(_SWITCHED)
            if [*map(_VERSION, params)] != versions:
                self._tell(_CHANGED)

    def _tell(self, note: str) -> None:
        """Says it, once."""
        if note not in self._told:
            self._told.add(note)
            self.context.say(note)

    def finish(self) -> None:
        """Runs the loss functions on from their last update to their ends."""
        for one in self._open.values():
            yielded = self._next(one)
            if yielded is not _END:
                _name_of(one, yielded)
                raise self._differs(one)

    def _differs(self, one: _Open) -> LossError:
        return LossError(
            f"the loss function yielded {' -> '.join(one.yielded)}, and the plan of this step is "
            f"{' -> '.join(self._names)} -> its end. Yield each update once, in this order; which "
            "updates a step has, for ranks without a batch as well, Trainer(updates=...) says"
        )

    def kept(self, micro: int) -> MicroBatch:
        """Returns the batch of a loss function under way; none where this rank has left it out."""
        one = self._open.get(micro)
        return (None, 0) if one is None else (one.batch, one.samples)

    def replayed(self, made: Any) -> Any:
        """Returns the loss that a loss function, called anew, yields for the update under way."""
        for name, loss in _generator(made):
            if name == self._now:
                return loss
        raise LossError(f"the loss function did not yield {self._now!r} this time")


def weakly(compute: Callable[[Step], Loss]) -> Callable[[Step], Loss]:
    """Returns a method that does not hold its owner, for whoever that holds."""
    method = WeakMethod(compute)

    def call(step: Step) -> Loss:
        computes = method()
        assert computes is not None
        return computes(step)

    return call


def _started(loss_fn: LossFn, *given: Any) -> Generator[Any, None, None]:
    """Calls it where the first of its losses is asked for."""
    yield from _generator(loss_fn(*given))


def _generator(made: object) -> Generator[Any, None, None]:
    if isinstance(made, Generator):
        return made
    raise LossError(
        f"loss_fn returned {type(made).__name__}; with optimizer={{name: ...}} it is a generator, "
        "and yields each update's name and loss: `yield 'critic', loss`. For one loss, and all "
        "stepped together, pass a list of optimizers"
    )


def _name_of(one: _Open, yielded: Any) -> str:
    """Notes what was yielded, for messages, and returns the name."""
    if yielded is _END:
        name = "its end"
    elif isinstance(yielded, tuple) and len(yielded) == 2 and isinstance(yielded[0], str):
        name = yielded[0]
    else:
        kind = type(yielded).__name__
        raise LossError(
            f"the loss function yielded {kind}, not a name and a loss: `yield 'critic', loss`"
        )
    one.yielded.append(name)
    return name


class _Keeper(Protocol):
    def kept(self, micro: int) -> MicroBatch: ...


class Again:
    """The micro-batches of a step once more, as they were kept, and none for those that are not."""

    def __init__(self, keeper: "_Keeper", micros: int) -> None:
        self.micros = micros
        self._keeper, self._micro = keeper, 0

    def next(self) -> MicroBatch:
        micro, self._micro = self._micro, self._micro + 1
        return self._keeper.kept(micro)

    def is_last(self) -> bool:
        return False  # the first has told

    def rows(self) -> list[int] | None:
        return None  # asked for in evaluations only
