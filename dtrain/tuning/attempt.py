"""A short training of a Trainer's model, of which nothing is left."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dtrain.callback import Callback, Hooks
from dtrain.callbacks import Freeze, LossSpikeGuard, NonFiniteGuard
from dtrain.context import parts_of
from dtrain.data import AccumulationSlot, Data
from dtrain.errors import ConfigError
from dtrain.plan import Recorder
from dtrain.step import PrecisionSlot, check_trains
from dtrain.strategies import Strategy
from dtrain.trainer import Trainer
from dtrain.tuning.snapshot import Snapshot

_SHAPE = (Callback.on_batch, Callback.on_loss, Callback.on_grads_ready)
_KINDS = (PrecisionSlot, AccumulationSlot, Freeze)
_GUARDS = (NonFiniteGuard, LossSpikeGuard)  # which would end what is tried out


def begin(trainer: Trainer, call: str, take: Callable[[], Data]) -> Data:
    """Returns the data, once all is looked at, and says what does not take part.

    Raises ConfigError where the Trainer has trained, or cannot. Ranks: all, communicates.
    """
    with trainer.world.comm.lockstep(call):
        check_trains(trainer.model, trainer.optimizer)
        if trainer._phases.live:
            raise ConfigError(f"{call} comes before the Trainer's first fit: make a new Trainer")
        if trainer.context.sharded:
            raise ConfigError(
                f"{call} does not work with strategy='fsdp' yet: a sharded model cannot be put "
                "into another Trainer, nor copied. Try it out with 'ddp', on a smaller model"
            )
        data = take()
        if data.is_stream and isinstance(data.dataset, Iterator):
            raise ConfigError(
                f"{call}: the data are an iterator, which gives its batches once, and they would "
                "be gone: pass an object whose __iter__ begins anew, or a dataset"
            )
        if left := [one.name for one in _callbacks(trainer) if not _shapes(one)]:
            trainer.context.say(f"{call} tries it without {', '.join(left)}")
    trainer._say_apart()
    return data


def _callbacks(trainer: Trainer) -> list[Callback]:
    """Returns the user's own: not those of a trial of the script."""
    return [one for one in trainer.hooks.callbacks if not isinstance(one, Recorder)]


def _shapes(callback: Callback) -> bool:
    """Says whether it makes a step's gradient what it is.

    No schedules, no averages, no checkpoints; and no guards.
    """
    if isinstance(callback, _GUARDS):
        return False
    return isinstance(callback, _KINDS) or any(map(Hooks([callback]).has, _SHAPE))


def shaping(trainer: Trainer) -> list[Callback]:
    """Returns copies of the callbacks that take part; of the Trainer's own parts they share.

    Raises ConfigError where one cannot be copied. Ranks: all, communicates.
    """
    model, optimizer = trainer.model, trainer.optimizer
    shared = [trainer, trainer.context, trainer.world, optimizer, *parts_of(optimizer).values()]
    shared += [*model.modules(), *model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(one): one for one in shared}
    copies = []
    with trainer.world.comm.lockstep("copies of callbacks"):
        for one in filter(_shapes, _callbacks(trainer)):
            try:
                copies.append(copy.deepcopy(one, memo))
            except Exception as error:
                raise ConfigError(
                    f"{one.name} cannot be copied ({type(error).__name__}: {error}), and what is "
                    "tried out must leave no trace in it: give it a __deepcopy__(self, memo), or "
                    "use a Trainer without it"
                ) from error
    return copies


@contextmanager
def attempt(
    trainer: Trainer, call: str, callbacks: Sequence[Callback], strategy: Strategy | None = None
) -> Iterator[Trainer]:
    """A block with a Trainer of the same make, which says nothing and writes nothing.

    After it, model and optimizer are as before, bit for bit. Ranks: all, communicates.
    """
    engine = trainer._engine
    with trainer.world.comm.lockstep(call):
        before = Snapshot(trainer.model, trainer.optimizer)
    try:
        yield Trainer(
            trainer.model,
            trainer.optimizer,
            engine.loss_fn,
            callbacks=callbacks,
            sinks=[],
            strategy=strategy or copy.deepcopy(engine.strategy),
            seed=trainer._seed,
            eval_fn=engine.eval_fn,
            hang_after_s=trainer._watchdog.hang_after_s,
            check_ranks=engine.replicas.active or trainer.world.size == 1,
            keep_modes=engine.keep_modes,
            graph=engine.graph,
            updates=engine.plan,
        )
    finally:
        before.put_back()
