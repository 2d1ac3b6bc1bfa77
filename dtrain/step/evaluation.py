"""Exact evaluation: every sample once, sums reduced once, the same numbers on all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from dtrain.callback import Callback, Hooks
from dtrain.context import Context, Step
from dtrain.data import EndOfStream, Feed
from dtrain.distributed import EVAL_LOSS_FN, EVALUATION, share_buffers
from dtrain.metrics import Means
from dtrain.step.gather_with_grad import Gathers
from dtrain.step.micro_step import LossFn, as_loss
from dtrain.step.precision import Precision


@dataclass
class Evaluation:
    """Computes the loss and every metric of a loss function, over all of the data."""

    loss_fn: LossFn  # gets the bare model, in eval mode, without gradients
    gathers: Gathers  # of the loss function
    hooks: Hooks  # of which `on_eval_batch` fires here
    precision: Precision  # the same as in training
    context: Context
    _means: dict[str, Means] = field(default_factory=dict)  # kept: ranks agree on names only once

    def run(self, feeds: dict[str, Feed]) -> dict[str, float]:
        """Returns the metrics of each set, named after it, as in ``eval/loss``.

        Ranks: all, communicates: buffers first, sums once at the end of each set.
        """
        context = self.context
        share_buffers(context.model, context.comm)
        metrics: dict[str, float] = {}
        for label, feed in feeds.items():
            means = self._means.setdefault(label, Means(label, context.device))
            means.drop()  # of an evaluation that failed
            with torch.no_grad(), _eval_mode(context.model):
                self._add(feed, label, means)
            metrics |= means.agree(context.comm)
        return metrics

    def _add(self, feed: Feed, label: str, means: Means) -> None:
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
                    comm.serve_gathers(self.gathers)
                    try:
                        with self.precision.autocast():
                            returned = self.loss_fn(context.model, step.batch, context)
                    finally:
                        comm.serve_gathers(None)
                    step.loss = loss = as_loss(returned, step.samples)
                    assert loss.weight is not None
                    means.add(f"{label}/loss", loss.mean, loss.weight)
                    for name, value in loss.metrics.items():
                        means.add(f"{label}/{name}", value, loss.weight)
                    self.hooks.fire(Callback.on_eval_batch, context, step)
                done = self.gathers.finish(completed=step.loss is not None, ended=ended)
                activity.end_lap(EVALUATION)
            # Where loss functions gather, a rank whose stream has ended waits for the others.
            if ended and all(one.ended for one in done):
                break


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
