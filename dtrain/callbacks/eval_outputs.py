"""Figures of a whole set, such as AUC, that are no mean over its batches."""

from collections.abc import Callable, Mapping
from typing import Any

from dtrain.callback import Callback
from dtrain.context import Context, Step
from dtrain.distributed import current, init
from dtrain.errors import ConfigError, LossError
from dtrain.metrics import Outputs, in_order, joined, number_of


class EvalOutputs(Callback):
    """Adds figures of the outputs of a whole evaluation set, as ``eval/auc``.

    What the evaluation's function returns as ``Loss(outputs=...)`` or ``Metrics(outputs=...)`` is
    brought together: each sample once, in the dataset's order, at any number of ranks. It is a
    tensor or an array with a row for each sample, a list with an item for each (a text, or a tensor
    of its own length), or a dict or tuple of these; the functions get one such of all samples.
    Each rank keeps its own on the CPU; rank 0 needs room for those of a set, twice. Callbacks that
    judge by these figures come after it in the list.
    Example: ``EvalOutputs({"auc": lambda out: roc_auc_score(out["label"], out["score"])})``.

    Args:
        figures: name to function, from the outputs of a set to a number. A set without outputs gets
            no figures.

    Ranks: all, communicates at the end of an evaluation; the functions run on rank 0 only.
    """

    def __init__(self, figures: Mapping[str, Callable[[Any], Any]]) -> None:
        if not isinstance(figures, Mapping) or not figures:
            raise ConfigError(f"EvalOutputs({figures!r}): a dict from name to function")
        for name, fn in figures.items():
            if not isinstance(name, str) or not name or name == "loss":
                raise ConfigError(f"EvalOutputs: {name!r} cannot be a figure's name; such as 'auc'")
            if not callable(fn):
                raise ConfigError(f"EvalOutputs: {name!r} is {fn!r}, and must be a function")
        self._figures = dict(figures)
        self.adds = tuple(self._figures)
        self._sets: dict[str, Outputs] = {}
        self._without: set[str] = set()  # sets with a batch that had none

    def on_eval_start(self, ctx: Context) -> None:
        self._sets, self._without = {}, set()

    def on_eval_batch(self, ctx: Context, step: Step) -> None:
        assert step.loss is not None
        if step.loss.outputs is None:
            self._without.add(step.prefix)
            return
        outputs = self._sets.setdefault(step.prefix, Outputs("EvalOutputs"))
        if ctx.counts:
            outputs.add(step.loss.outputs, step.samples, step.rows)

    def on_eval_end(self, ctx: Context, metrics: dict[str, float]) -> None:
        everyones = ctx.comm.gather_objects("EvalOutputs: sets", ([*self._sets], self._without))
        prefixes = {prefix: None for theirs, _ in everyones for prefix in theirs}
        if not prefixes:
            raise ConfigError(
                "EvalOutputs: the evaluation's function returned no outputs: return "
                "dtrain.Loss(loss, outputs=...), or dtrain.Metrics(outputs=...)"
            )
        for prefix in prefixes:
            if any(prefix in without for _, without in everyones):
                raise LossError(
                    f"EvalOutputs: some batches of {prefix!r} had outputs, and others None; for a "
                    "batch without any, return them empty, or ctx.request.skip(why)"
                )
            if twice := [name for name in self._figures if f"{prefix}/{name}" in metrics]:
                raise ConfigError(
                    f"EvalOutputs adds '{prefix}/{twice[0]}', and there is such a figure already: "
                    "name one of them otherwise"
                )
            outputs = self._sets.pop(prefix, None) or Outputs("EvalOutputs")
            batches = outputs.gather(ctx.comm, keeps=(current() or init()).is_main)
            label = f"EvalOutputs of {prefix!r}"
            found = ctx.comm.on_main(label, lambda b=batches: self._computed(b))  # type: ignore[misc]
            metrics.update({f"{prefix}/{name}": value for name, value in found.items()})

    def _computed(self, batches: list[Any]) -> dict[str, float]:
        samples = sum(one.samples for one in batches)
        whole = joined(*in_order(batches, "EvalOutputs"), "EvalOutputs")
        batches.clear()
        found = {}
        for name, fn in self._figures.items():
            try:
                found[name] = float(number_of(name, fn(whole)))
            except Exception as error:
                error.add_note(f"(in EvalOutputs' {name!r}, of {samples} samples)")
                if "BFloat16" in str(error):
                    error.add_note("(NumPy has no bfloat16: return outputs in float32, x.float())")
                raise
        return found

    def on_error(self, ctx: Context, error: BaseException) -> None:
        self._sets = {}
