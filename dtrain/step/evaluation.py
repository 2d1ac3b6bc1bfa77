"""Evaluation: every sample once, in eval mode, and what it draws and logs is nobody else's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from dtrain.callback import Callback, Hooks
from dtrain.context import Context, Outbox, Step
from dtrain.data import EndOfStream, Feed
from dtrain.distributed import EVAL_LOSS_FN, EVALUATION, World, share_buffers, streams_apart
from dtrain.errors import ConfigError, DataError, LossError
from dtrain.metrics import Means, with_added
from dtrain.step.gather_with_grad import Gathers
from dtrain.step.loss_forms import LossFn, as_loss
from dtrain.step.loss_words import explain
from dtrain.step.memory_words import explain_memory
from dtrain.step.precision import Precision, fresh_casts


@dataclass(eq=False)
class Evaluation:
    """Evaluates the model as it is. Ranks: all."""

    context: Context
    outbox: Outbox  # what hooks have logged
    world: World
    eval_fn: LossFn  # gets the bare model, in eval mode, without gradients
    precision: Precision
    hooks: Hooks
    training: Means  # of the training, which may be in the middle of a report

    def __post_init__(self) -> None:
        self._gathers = Gathers(self.world.comm, self.world.rank, self.world.size)
        self._means: dict[str, Means] = {}  # kept: ranks agree on names only once
        self._runs = False

    def run(self, feeds: dict[str, Feed]) -> dict[str, float]:
        """Returns the metrics of each set, named after it, as in ``eval/loss``, and callbacks'.

        Every sample counts once, and all ranks get the same numbers. A hook may evaluate something
        else meanwhile; of that, no hooks fire. Ranks: all, communicates: buffers first, sums once
        at the end of each set, and whether callbacks left the same on all ranks.
        """
        with self._apart():
            if self._runs:
                return self._sets(feeds)
            self._runs = True
            try:
                self.hooks.fire(Callback.on_eval_start, self.context)
                metrics = self._sets(feeds)
                left = dict(metrics)
                self.hooks.fire(Callback.on_eval_end, self.context, left)
                any_left = self.hooks.has(Callback.on_eval_end)
                return with_added(metrics, left, self.context.comm) if any_left else metrics
            finally:
                self._runs = False

    def run_apart(self, feeds: dict[str, Feed]) -> dict[str, float]:
        """The same as no part of a training: what hooks log or ask for meanwhile is forgotten."""
        context, outbox, request = self.context, self.outbox, self.context.request
        logged, pending, in_fit = outbox.logged, request.pending, context.in_fit
        outbox.logged, request.pending, context.in_fit = {}, {kind: [] for kind in pending}, False
        try:
            return self.run(feeds)
        except BaseException as error:
            self.hooks.tell(context, error)
            raise
        finally:
            if in_fit:  # a signal's, which comes at any moment
                pending["preempt"] += request.pending["preempt"]
            outbox.logged, request.pending, context.in_fit = logged, pending, in_fit

    def _sets(self, feeds: dict[str, Feed]) -> dict[str, float]:
        context = self.context
        share_buffers(context.model, context.comm)
        metrics: dict[str, float] = {}
        for label, feed in feeds.items():
            means = self._means.setdefault(label, Means(label, context.device))
            means.drop()  # of an evaluation that failed
            feed.compare(label)
            with torch.no_grad(), _eval_mode(context.model):
                self._set(feed, label, means)
            if mixed := means.shares_with(self.training):  # in the middle of a training's report
                raise LossError(
                    f"the torchmetrics object {mixed[0]!r} holds batches of the training, too: "
                    "evaluate at an epoch's end, or with other objects (an eval_fn)"
                )
            if not (found := means.agree(context.comm)):
                raise DataError(
                    f"the evaluation ({label}) weighs nothing: no rank's data gave a batch (a "
                    "generator gives its batches once: pass an object whose __iter__ begins anew), "
                    "or every loss had weight 0"
                )
            if missed := means.missed():
                context.say(missed)
            if twice := ", ".join(sorted(metrics.keys() & found.keys())):
                raise ConfigError(f"two figures of the evaluation are named {twice}")
            metrics |= found
        return metrics

    def _set(self, feed: Feed, label: str, means: Means) -> None:
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
                if fetched is not None and fetched[0] is not None:
                    step.batch, step.samples = fetched
                    activity.enter(EVAL_LOSS_FN)
                    comm.serve_gathers(self._gathers)
                    try:
                        with self.precision.autocast():
                            returned = self.eval_fn(context.model, step.batch, context)
                    except Exception as error:
                        explain(error)
                        where = f"evaluation ({label})"
                        explain_memory(error, where, step, self, trains=False)
                        raise
                    finally:
                        comm.serve_gathers(None)
                    step.loss = loss = as_loss(returned, step.samples)
                    assert loss.weight is not None
                    means.add(f"{label}/loss", loss.mean, loss.weight)
                    for name, value in loss.metrics.items():
                        means.add(f"{label}/{name}", value, loss.weight)
                    self.hooks.fire(Callback.on_eval_batch, context, step)
                    del returned, loss
                del fetched
                done = self._gathers.finish(completed=step.loss is not None, ended=ended)
                # Let go of, before the next batch is made: it may be as large as memory allows.
                step.batch = step.loss = None
                activity.end_lap(EVALUATION)
            # Where loss functions gather, a rank whose stream has ended waits for the others.
            if ended and all(one.ended for one in done):
                break

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """A block, with its hooks: what they draw at random changes nothing elsewhere."""
        context = self.context
        number, rank = context.progress.step, self.world.rank
        own = streams_apart(context.rng, context.shared_rng, number=number, rank=rank)
        with own, fresh_casts():
            yield


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
