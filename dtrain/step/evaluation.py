"""Evaluation: every sample once, in eval mode, and what it draws and logs is nobody else's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from dtrain.callback import Callback, Hooks
from dtrain.context import Context, Loss, Outbox, Step
from dtrain.data import EndOfStream, Feed, MicroBatches
from dtrain.distributed import EVAL_LOSS_FN, EVALUATION, World, share_buffers, streams_apart
from dtrain.errors import ConfigError, DataError, LossError
from dtrain.metrics import Means, with_added
from dtrain.step.gather_with_grad import Gathers
from dtrain.step.loss_forms import LossFn, as_evaluated
from dtrain.step.loss_words import explain
from dtrain.step.memory_words import explain_memory
from dtrain.step.precision import Precision, fresh_casts
from dtrain.step.strategy import Strategy


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
    strategy: Strategy  # says whether ranks meet in the model

    def __post_init__(self) -> None:
        world, refused = self.world, self.strategy.no_gathers
        self._gathers = Gathers(world.comm, world.rank, world.size, refused)
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
                metrics = self._sets(feeds, hooked=True)
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

    def _sets(self, feeds: dict[str, Feed], *, hooked: bool = False) -> dict[str, float]:
        context = self.context
        share_buffers(context.model, context.comm)
        metrics: dict[str, float] = {}
        for label, feed in feeds.items():
            means = self._means.setdefault(
                label, Means(label, context.device, counts=self.world.counts)
            )
            means.drop()  # of an evaluation that failed
            feed.compare(label)
            with torch.no_grad(), _eval_mode(context.model):
                asked_for_none = self._set(feed, label, means, hooked=hooked)
            if mixed := means.shares_with(self.training):  # in the middle of a training's report
                raise LossError(
                    f"the torchmetrics object {mixed[0]!r} holds batches of the training, too: "
                    "evaluate at an epoch's end, or with other objects (an eval_fn)"
                )
            if note := feed.look_apart():
                context.say(f"{note} (This is of {label}.)")
            found, none = means.agree(context.comm), f"{label}: no figures"
            if not (found or context.comm.vote(none, asked_for_none)):
                raise DataError(
                    f"the evaluation ({label}) weighs nothing: no rank's data gave a batch (a "
                    "generator gives its batches once: pass an object whose __iter__ begins anew), "
                    "or every loss had weight 0, or every batch was skipped"
                )
            if missed := means.missed():
                context.say(missed)
            if twice := ", ".join(sorted(metrics.keys() & found.keys())):
                raise ConfigError(f"two figures of the evaluation are named {twice}")
            metrics |= found
        return metrics

    def _set(self, feed: Feed, label: str, means: Means, *, hooked: bool) -> bool:
        """Returns whether this rank had a batch of which no figure was to be made."""
        hooked = hooked and self.hooks.has(Callback.on_eval_batch)
        asked_for_none = False

        def take(step: Step, micro_batches: MicroBatches, returned: Any) -> None:
            nonlocal asked_for_none
            result = as_evaluated(returned, step.samples)
            assert result.weight is not None
            if isinstance(result, Loss):
                means.add(f"{label}/loss", result.mean, result.weight)
            elif not result.metrics:
                asked_for_none = True
            for name, value in result.metrics.items():
                means.add(f"{label}/{name}", value, result.weight)
            if hooked:
                step.loss, step.prefix = cast("Loss", result), label  # or Metrics, which say so
                step.rows = micro_batches.rows()
                self.hooks.fire(Callback.on_eval_batch, self.context, step)

        self._each(feed, f"evaluation ({label})", self.eval_fn, take)
        return asked_for_none

    def run_through(
        self, feed: Feed, fn: LossFn, take: Callable[[MicroBatches, int, Any], None]
    ) -> None:
        """Hands ``take`` what ``fn`` returns of each of this rank's micro-batches, of no figures.

        And where it came from, and how many samples it had. Ranks: all, communicates.
        """
        context = self.context

        def handed(step: Step, micro_batches: MicroBatches, returned: Any) -> None:
            take(micro_batches, step.samples, returned)

        with self._apart():
            feed.compare("predict")
            with torch.no_grad(), _eval_mode(context.model):
                self._each(feed, "predict", fn, handed, skips=False)
            if note := feed.look_apart():
                context.say(f"{note} (This is of predict: each has an output as often.)")

    def _each(
        self,
        feed: Feed,
        where: str,
        fn: LossFn,
        take: Callable[[Step, MicroBatches, Any], None],
        *,
        skips: bool = True,
    ) -> None:
        """Calls ``fn`` with each of this rank's micro-batches, and ``take`` with what it returned.

        But of those that ``fn`` has asked to skip, where it may.
        """
        context, comm, activity = self.context, self.context.comm, self.context.comm.activity
        request = context.request
        activity.restart_batches()
        strategy, meets, all_ended = self.strategy, self.strategy.meets_in_forward, True
        for number, micro_batches in enumerate(feed.epoch(0, 0)):
            step = Step(number=number, micros=micro_batches.micros)
            ended = False
            for micro in range(step.micros):
                step.micro, completed = micro, False
                activity.begin_batch()
                try:
                    fetched = None if ended else micro_batches.next()
                except EndOfStream:
                    fetched, ended = None, True
                has = fetched is not None and fetched[0] is not None
                if meets:
                    all_ended = strategy.meet(has=has, ended=ended, first=not (number or micro))
                if meets and not has:
                    strategy.evaluate(None)
                if fetched is not None and has:
                    step.batch, step.samples = fetched
                    activity.enter(EVAL_LOSS_FN)
                    comm.serve_gathers(self._gathers)
                    # A hook of a step may evaluate, which may be one that is being skipped.
                    outer, skipped = (request.skippable, request.skipped), list[str]()
                    request.skippable, request.skipped = skips, skipped
                    try:
                        with self.precision.autocast():
                            run = partial(fn, context.model, step.batch, context)
                            returned = strategy.evaluate(run, step.batch) if meets else run()
                    except Exception as error:
                        explain(error)
                        explain_memory(error, where, step, self, trains=False)
                        raise
                    finally:
                        comm.serve_gathers(None)
                        request.skippable, request.skipped = outer
                    if completed := not skipped:
                        take(step, micro_batches, returned)
                    del returned
                del fetched
                done = self._gathers.finish(completed=completed, ended=ended)
                # Let go of, before the next batch is made: it may be as large as memory allows.
                step.batch = step.loss = None
                activity.end_lap(EVALUATION)
                comm.look_for_failures()
            # Where loss functions gather, a rank whose stream has ended waits for the others.
            if ended and all_ended and all(one.ended for one in done):
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
