"""Exact evaluation: every sample once, sums reduced once, the same numbers on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dtrain.callback import Callback, Hooks
from dtrain.context import Context, Step
from dtrain.data import EndOfStream, Feed
from dtrain.distributed import EVAL_LOSS_FN, EVALUATION
from dtrain.metrics import Means
from dtrain.step.gather_with_grad import Gathers
from dtrain.step.micro_step import LossFn, as_loss
from dtrain.step.precision import Precision


def evaluate(
    feed: Feed,
    loss_fn: LossFn,
    means: Means,
    *,
    label: str,
    gathers: Gathers,
    context: Context,
    hooks: Hooks,
    precision: Precision,
) -> dict[str, float]:
    """Returns ``label/loss`` and every metric that ``loss_fn`` gives, over all of the data.

    Args:
        feed: one pass over the data; nothing in it is padded, dropped or repeated.
        loss_fn: gets the bare model, in eval mode, without gradients.
        means: kept from one evaluation to the next, because ranks agree on names only once.
        label: what the metrics' names begin with, such as ``"eval"``.
        gathers: serves the loss function's gathers.
        context: for the hooks, and the model.
        hooks: fire ``on_eval_batch``.
        precision: the same as in training.

    Ranks: all, communicates once, at the end.
    """
    means.drop()  # of an evaluation that failed
    comm, activity = context.comm, context.comm.activity
    activity.restart_batches()
    with torch.no_grad(), eval_mode(context.model):
        for number, step_feed in enumerate(feed.epoch(0, 0)):
            step = Step(number=number, micros=step_feed.micros)
            ended = False
            for micro in range(step_feed.micros):
                step.micro, step.loss = micro, None
                activity.begin_batch()
                try:
                    fetched = None if ended else step_feed.next()
                except EndOfStream:
                    fetched, ended = None, True
                if fetched is not None:
                    step.batch, step.samples = fetched
                    activity.enter(EVAL_LOSS_FN)
                    comm.serve_gathers(gathers)
                    try:
                        with precision.autocast():
                            returned = loss_fn(context.model, step.batch, context)
                    finally:
                        comm.serve_gathers(None)
                    step.loss = loss = as_loss(returned, step.samples)
                    assert loss.weight is not None
                    means.add(f"{label}/loss", loss.mean, loss.weight)
                    for name, value in loss.metrics.items():
                        means.add(f"{label}/{name}", value, loss.weight)
                    hooks.fire(Callback.on_eval_batch, context, step)
                done = gathers.finish(completed=step.loss is not None, ended=ended)
                activity.end_lap(EVALUATION)
            # Where loss functions gather, a rank whose stream has ended waits for the others.
            if ended and all(one.ended for one in done):
                break
    return means.agree(comm)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts every submodule in eval mode, and each back into its own mode afterwards.

    Ranks: all, local.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        # Not `model.train()`: that would wake parts that the user keeps in eval mode.
        for module in training:
            module.training = True
