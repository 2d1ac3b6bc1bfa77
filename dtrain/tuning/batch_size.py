"""The largest micro-batch that fits into memory, found by trying."""

import math
from typing import Any

from dtrain import accelerator
from dtrain.callbacks import GradientAccumulation
from dtrain.data import AccumulationSlot, Data
from dtrain.errors import CommError, ConfigError, DtrainError, RankMismatch
from dtrain.strategies import Flat
from dtrain.trainer import Trainer
from dtrain.tuning.attempt import attempt, begin, shaping

_CALL = "find_batch_size"


def find_batch_size(
    trainer: Trainer, train: Any, *, batch_size: int | None = None, steps: int = 2
) -> int:
    """Returns the largest micro-batch that fits on every rank; the global batch is what it was.

    A rank's part of a batch is cut into 1, 2, 4, ... micro-batches, until so many steps run through
    on all ranks, and then into fewer as long as they do. Model and optimizer are as before. It is
    for GPUs: where the memory of a host is short, the system ends processes.

    Example::

        plain = dtrain.Trainer(model, optimizer, loss_fn)
        micro = dtrain.find_batch_size(plain, train_set, batch_size=512)
        trainer = dtrain.Trainer(
            model, optimizer, loss_fn, callbacks=[GradientAccumulation(micro_batch_size=micro)]
        )

    Args:
        trainer: one that has not trained yet, with any optimizers. Its precision, ``Freeze``, and
            callbacks that change batches, losses or gradients, take part.
        train: a dataset, or :class:`~dtrain.Data`. It meets the first batches only: where samples
            differ in size, list large ones, ``Data(..., order=[rows])``.
        batch_size: the global batch, as for ``fit``.
        steps: how many steps are to run through.

    Raises:
        ConfigError: the Trainer has trained already, or ``train`` comes in ready batches.
        OutOfMemoryError: one sample is too much. (On other ranks: RemoteError.)

    Ranks: all, communicates.
    """

    def take() -> Data:
        data = Data.of(train, batch_size, shuffle=True)
        if data.is_stream or steps < 1:
            raise ConfigError(
                "find_batch_size takes a dataset with a batch_size (an iterable comes in ready "
                f"batches), and steps from 1 on, not {steps}"
            )
        return data

    data = begin(trainer, _CALL, take)
    largest = min(data.batch_size or 0, data.length or math.inf)  # that there is to be tried
    share = -(-int(largest) // trainer.world.size)
    too_few, parts = 0, 1
    while not _fits(trainer, data, -(-share // parts), steps, last=parts >= share):
        too_few, parts = parts, min(2 * parts, share)
    while parts - too_few > 1:
        between = (too_few + parts) // 2
        if _fits(trainer, data, -(-share // between), steps):
            parts = between
        else:
            too_few = between
    return -(-share // parts)


def _fits(trainer: Trainer, data: Data, micro: int, steps: int, *, last: bool = False) -> bool:
    """Says whether it does on all ranks. Raises what else went wrong; the ``last`` must fit."""
    others = [one for one in shaping(trainer) if not isinstance(one, AccumulationSlot)]
    callbacks = [*others, GradientAccumulation(micro_batch_size=micro)]
    # There a rank that fails in backward leaves nobody waiting.
    given = trainer._engine.strategy
    flat = None if isinstance(given, Flat) else Flat(find_unused_parameters=given.find_unused)
    failure: Exception | None = None
    try:
        with attempt(trainer, _CALL, callbacks, flat) as tried:
            tried.fit(data, max_steps=steps, history=1)
    except (RankMismatch, CommError):
        raise  # on all ranks
    except (DtrainError, RuntimeError, MemoryError) as error:
        failure = error
    try:
        mine = failure is not None and accelerator.is_out_of_memory(failure)
        full = trainer.world.comm.vote(f"{_CALL}: out of memory", mine)
        if failure is not None and (last or not full):
            if full:
                failure.add_note(f"(find_batch_size: with micro-batches of {micro}, the smallest)")
            raise failure
        return not full
    finally:
        del failure  # its frames hold what was too much
        accelerator.let_go()
