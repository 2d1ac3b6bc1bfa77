"""Evaluating and predicting: the model as it is, on all ranks, each sample once."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, overload

from torch import nn

from dtrain.callback import Hooks
from dtrain.context import Context, Loss, Metrics, Outbox
from dtrain.data import (
    AccumulationSlot,
    Cut,
    Data,
    Feed,
    MicroBatches,
    SizedSlot,
    open_evals,
    open_feed,
    sizes_of,
)
from dtrain.distributed import World, check_same_call
from dtrain.errors import ConfigError, DataError, LossError
from dtrain.inference.parts import Parts
from dtrain.metrics import Outputs, in_order, kept, listed
from dtrain.sinks import History, Sink
from dtrain.step import Engine, LossFn, adapt
from dtrain.watchdog import Watchdog


class Inference:
    """The part of a :class:`~dtrain.Trainer` that needs no optimizer. Ranks: all, communicates."""

    world: World
    hooks: Hooks
    context: Context
    _engine: Engine
    _watchdog: Watchdog
    _outbox: Outbox
    _sinks: Sequence[Sink]
    _accumulation: AccumulationSlot | None
    _trains_only: bool  # there is no function for evaluation beside that of the loss

    def evaluate(self, data: Any, *, batch_size: int | None = None) -> dict[str, float]:
        """Returns ``eval/loss`` and the other metrics over all of ``data``, each sample once.

        It is of the model as it is; without a loss where the function returns
        :class:`~dtrain.Metrics`. Evaluation hooks fire as in ``fit``, with ``ctx.in_fit`` False, so
        what callbacks add is there, too; what they log or ask for is forgotten, and nothing judges
        by it. What it draws at random follows the script's seed, and moves no stream: the same in
        two calls between which nothing was drawn or trained.

        Args:
            data: like ``fit``'s ``eval_set``.
            batch_size: the global batch, where ``data`` is a dataset.

        Raises:
            DataError: the data cannot be evaluated on.
            RemoteError: another rank failed.

        Ranks: all, communicates.
        """
        with self._watchdog, self.world.comm.lockstep(lambda: self.hooks.failed_in or "evaluate"):
            self._engine.make_equal()
            evals = self._open_evals(data, batch_size)
            metrics = self._engine.evaluation.run_apart(evals)
        self._say_apart()
        return metrics

    @overload
    def predict(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        fn: Callable[..., Any] | None = None,
        to: None = None,
    ) -> list[Any]: ...

    @overload
    def predict(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        fn: Callable[..., Any] | None = None,
        to: str | Path,
    ) -> Path: ...

    def predict(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        fn: Callable[..., Any] | None = None,
        to: str | Path | None = None,
    ) -> list[Any] | Path:
        """Returns a list with the model's output for each sample of ``data``, equal on all ranks.

        In the dataset's order, each sample once, on the CPU; where ``Data(order=[...])`` lists
        rows, in that order; of a stream, rank 0's samples, then rank 1's, and so on. It is of the
        model as it is, in eval mode, without gradients. No hooks fire.

        Example::

            scores = trainer.predict(test_set, batch_size=256, fn=lambda model, batch: model(batch))

        Args:
            data: a dataset, an iterable of ready batches, or :class:`~dtrain.Data`.
            batch_size: the global batch, where ``data`` is a dataset.
            fn: from ``(model, batch)`` or ``(model, batch, ctx)`` to outputs: a tensor or an array
                with a row for each sample, a list with an item for each, or a dict or tuple of
                these, of which each sample's output is then one. ``eval_fn``'s (or ``loss_fn``'s)
                ``outputs`` if None.
            to: a folder that is not there yet, which all ranks share, for sets that do not fit into
                memory: each rank writes its samples in parts, which follow one another, and the
                folder is returned. It is there only once it is whole;
                :func:`~dtrain.load_predictions` reads it.

        Raises:
            ConfigError: ``to`` is there already, or not on all ranks.
            DataError: the data cannot be predicted on, or ``collate_fn`` has left samples out.
            LossError: what ``fn`` returns is not one output for each sample.
            OSError: a part could not be written; what was is removed.
            RemoteError: another rank failed.

        Ranks: all, communicates.
        """
        parts = None if to is None else Parts(to, self.world, self.context)
        with parts or nullcontext(), self._watchdog, self.world.comm.lockstep("predict"):
            self._engine.make_equal()
            given = Data.of(data, batch_size, shuffle=False)
            slot = self._accumulation
            unit = slot.micro_batch_size if isinstance(slot, SizedSlot) else 0
            feed = open_feed(given, self._engine.seat, self._split, cut=Cut(unit, apart=True))
            told = {"data": feed, "to": to, "batch size": given.batch_size}
            check_same_call(told, self.world.comm, "predict")
            outputs_of = _outputs_of(self._engine.eval_fn) if fn is None else _adapted(fn)
            scattered = given.order is not None and not given.is_listed
            if parts is None:
                outputs = self._listed(feed, outputs_of, by_row=scattered)
                found: list[Any] | Path = outputs
                count = len(outputs)
            else:
                if scattered:
                    raise ConfigError(
                        f"predict(to=...): order={given.order_name} would scatter each part's "
                        "samples over the dataset: leave `order` out, or `to`"
                    )
                found, count = parts.folder, self._written(feed, outputs_of, parts)
            if not count:
                raise DataError(
                    "predict: no rank's data gave a sample (a generator gives its batches once: "
                    "pass an object whose __iter__ begins anew)"
                )
            if feed.samples not in (None, count):
                raise DataError(
                    f"predict: collate_fn has left out {feed.samples - count} of {feed.samples} "
                    "samples, so it is not known whose outputs the others are: have it keep all, "
                    "or list the rows to predict on, `Data(..., order=[...])`"
                )
        self._say_apart()
        return found

    def _listed(self, feed: Feed, outputs_of: LossFn, *, by_row: bool) -> list[Any]:
        outputs = Outputs("predict")

        def take(of: MicroBatches, samples: int, returned: Any) -> None:
            if self.context.counts:
                outputs.add(returned, samples, of.rows() if by_row else None)

        self._engine.evaluation.run_through(feed, outputs_of, take)
        return listed(*in_order(outputs.gather(self.world.comm, keeps=True), "predict"))

    def _written(self, feed: Feed, outputs_of: LossFn, parts: Parts) -> int:
        def take(of: MicroBatches, samples: int, returned: Any) -> None:
            if self.context.counts:
                parts.add(kept(returned, samples, "predict"), samples)

        try:
            parts.open()
            self._engine.evaluation.run_through(feed, outputs_of, take)
            return parts.close(feed.samples)
        except BaseException:
            parts.drop()
            raise

    def _open_evals(
        self, given: Any, batch_size: int | None, train: Data | None = None
    ) -> dict[str, Feed]:
        if given is not None and self._engine.updates is not None and self._trains_only:
            raise ConfigError(
                "a loss function that yields cannot evaluate: pass Trainer(eval_fn=...), a "
                "function from (model, batch) to dtrain.Loss or dtrain.Metrics"
            )
        slot = self._accumulation
        unit = slot.micro_batch_size if isinstance(slot, SizedSlot) else 0
        return open_evals(given, batch_size, self._engine.seat, self._split, train, unit=unit)

    def _split(self, share: int) -> list[int]:
        return [share] if (slot := self._accumulation) is None else sizes_of(slot, share)

    def _say_apart(self) -> None:
        if not self.context.in_fit:  # no sink is open that could tell
            History.say_apart(self._outbox, self._sinks, active=self.world.is_main)


def _adapted(fn: Callable[..., Any]) -> LossFn:
    try:
        return adapt(fn)
    except LossError as error:
        error.add_note("(that is the `fn` of predict)")
        raise


def _outputs_of(eval_fn: LossFn) -> LossFn:
    def outputs(model: nn.Module, batch: Any, ctx: Context) -> Any:
        returned = eval_fn(model, batch, ctx)
        found = returned.outputs if isinstance(returned, Loss | Metrics) else None
        if found is None:
            raise LossError(
                "predict: the evaluation's function returned no outputs: pass predict(fn=...), a "
                "function from (model, batch) to outputs; or return dtrain.Loss(..., outputs=...)"
            )
        return found

    return outputs
