"""A short training of a Trainer's model, of which nothing is left."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dtrain.callback import Callback
from dtrain.callbacks import LossSpikeGuard, NonFiniteGuard
from dtrain.data import AccumulationSlot
from dtrain.errors import ConfigError
from dtrain.step import PrecisionSlot, check_trains
from dtrain.strategies import Strategy
from dtrain.trainer import Trainer

_SHAPE = (Callback.on_batch, Callback.on_loss, Callback.on_grads_ready)


def shaping(trainer: Trainer) -> list[Callback]:
    """Returns copies of the callbacks that make a step's gradient what it is.

    No schedules, no averages, no checkpoints; and no guards, which would end what is tried out.
    """
    slots = PrecisionSlot, AccumulationSlot
    shapes = [
        one
        for one in trainer.hooks.callbacks
        if isinstance(one, slots) or any(getattr(type(one), h.__name__) is not h for h in _SHAPE)
    ]
    return [copy.deepcopy(o) for o in shapes if not isinstance(o, NonFiniteGuard | LossSpikeGuard)]


@contextmanager
def attempt(
    trainer: Trainer, call: str, callbacks: Sequence[Callback], strategy: Strategy | None = None
) -> Iterator[Trainer]:
    """A block with a Trainer of the same model, optimizer and loss function, which says nothing.

    After it, model and optimizer are as before, bit for bit. Raises ConfigError where the Trainer
    has trained, or cannot. Ranks: all, communicates.
    """
    with trainer.world.comm.lockstep(call):
        check_trains(trainer.model, trainer.optimizer)
        if trainer._phases.live:
            raise ConfigError(f"{call} comes before the Trainer's first fit: make a new Trainer")
    model, optimizer = trainer.model, trainer.optimizer
    tensors = [*model.parameters(), *model.buffers()]
    held = [tensor.detach().clone() for tensor in tensors]
    state = {p: copy.deepcopy(values) for p, values in optimizer.state.items()}
    groups = [
        {key: copy.deepcopy(v) for key, v in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    try:
        yield Trainer(
            model,
            optimizer,
            trainer._engine.loss_fn,
            callbacks=callbacks,
            sinks=[],
            strategy=strategy or copy.deepcopy(trainer._engine.strategy),
            seed=trainer._seed,
        )
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, held, strict=True):
                tensor.copy_(before)
        for parameter in model.parameters():
            parameter.grad = None
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            for key in group.keys() - values.keys() - {"params"}:
                del group[key]
            for key, value in values.items():
                set_value(group, key, value)


def set_value(group: dict[str, object], key: str, value: object) -> None:
    """Sets a value of the optimizer; one that is a tensor stays the one that it is."""
    now = group.get(key)
    if isinstance(now, Tensor):
        now.copy_(value) if isinstance(value, Tensor) else now.fill_(value)  # type: ignore[call-overload]
    else:
        group[key] = value
