"""Early stopping, agreed by all ranks."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from dtrain.callback import Callback, CountAs
from dtrain.callbacks.argument_checks import check_choice, find_metric
from dtrain.context import Context
from dtrain.distributed import Rule, named_state, placed_like, plain_name
from dtrain.errors import ConfigError


class EarlyStopping(Callback):
    """Stops once a metric has not improved for ``patience`` checks in a row.

    A metric by name is agreed, so all ranks stop at the same step. Where ``monitor`` is a function,
    each rank judges by its own value, and ``vote`` decides. Metrics ``eval/...`` are checked after
    each evaluation; functions, and the epoch's mean of ``train/...``, at the end of each epoch.
    What is not finite is no improvement.
    Example: ``EarlyStopping("eval/accuracy", mode="max", patience=3, restore_best=True)``.

    Args:
        monitor: a metric's name, or a function from the context to this rank's number.
        mode: whether less (``"min"``) or more (``"max"``) is better.
        patience: how many checks without improvement are borne.
        min_delta: what counts as an improvement must be larger than this.
        restore_best: the weights of the best check count in the end: after ``fit`` the model holds
            them, and ``load_model`` gives them. Beside ``EMA`` these are averages.
        vote: for a function: stop if ``"any"``, the ``"majority"`` or ``"all"`` ranks would.

    Ranks: all, communicates once a check where ``monitor`` is a function.
    """

    def __init__(
        self,
        monitor: str | Callable[[Context], float],
        *,
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        restore_best: bool = False,
        vote: Rule = "any",
    ) -> None:
        check_choice("EarlyStopping", "mode", mode, ("min", "max"))
        check_choice("EarlyStopping", "vote", vote, get_args(Rule))
        if patience < 0 or min_delta < 0:
            raise ConfigError(
                f"EarlyStopping(patience={patience}, min_delta={min_delta}): must be 0 or more"
            )
        if restore_best and callable(monitor):
            raise ConfigError(
                "EarlyStopping(restore_best=True) needs a metric by name: with a function, ranks "
                "may differ about which weights were best"
            )
        self._metric = monitor if isinstance(monitor, str) else ""
        self.monitors = (self._metric,) if self._metric else ()
        self._judge = None if isinstance(monitor, str) else monitor
        self._after_evaluation = self._metric.startswith("eval/")
        self._sign = 1.0 if mode == "min" else -1.0
        self._judges_by = [self._metric, mode]  # what `best` is the best of
        self._patience = patience
        self._min_delta = min_delta
        self._restore_best = restore_best
        self._vote: Rule = vote
        self.best = math.inf  # of sign * value: less is better
        self.bad_checks = 0
        self._weights: dict[str, Tensor] = {}
        self._told_later = ""
        self._phase = 0  # of the run's fits, the one that is judged

    def on_fit_start(self, ctx: Context) -> None:
        if ctx.progress.phase != self._phase:  # another fit of the run, with a patience of its own
            self._phase = ctx.progress.phase
            self.best, self.bad_checks, self._weights = math.inf, 0, {}
        if self.bad_checks and self.bad_checks >= self._patience:  # a further fit of this process
            ctx.say(f"EarlyStopping had stopped after {self.bad_checks} checks; they count anew")
            self.bad_checks = 0

    def on_epoch_start(self, ctx: Context) -> None:
        if self._told_later:
            ctx.say(self._told_later)
            self._told_later = ""
        held = _tensors(ctx) if self._weights else {}  # from a checkpoint they are whole
        self._weights = {n: placed_like(t, held.get(n, t)) for n, t in self._weights.items()}

    def on_eval_end(self, ctx: Context, metrics: dict[str, float]) -> None:
        if self._after_evaluation and ctx.in_fit:
            self._check(ctx, find_metric("EarlyStopping", self._metric, metrics))

    def on_epoch_end(self, ctx: Context) -> None:
        if self._judge is not None:
            self._check(ctx, float(self._judge(ctx)))
        elif not self._after_evaluation:
            self._check(ctx, find_metric("EarlyStopping", self._metric, ctx.metrics))

    def on_fit_end(self, ctx: Context) -> None:
        if not (self._after_evaluation or ctx.progress.of_phase().epoch):
            ctx.say(
                "EarlyStopping has judged nothing: it does at the end of an epoch, and none ended"
            )

    def weights(self, which: CountAs) -> Mapping[str, Tensor] | None:
        return self._weights if which in ("best", "final") else None

    def _check(self, ctx: Context, value: float) -> None:
        held = _tensors(ctx) if self._restore_best else {}
        if self._weights and _shapes(held) != _shapes(self._weights):
            ctx.say(
                "EarlyStopping: the model has other tensors than at its best check, whose weights "
                "cannot be restored any more: the best counts anew"
            )
            self.best, self._weights = math.inf, {}
        if self._sign * value < self.best - self._min_delta:
            self.best = self._sign * value
            self.bad_checks = 0
            self._weights = {name: t.detach().clone() for name, t in held.items()}
        else:
            self.bad_checks += 1  # NaN is no improvement
        enough = self.bad_checks > 0 and self.bad_checks >= self._patience
        if self._judge is not None:
            enough = ctx.comm.vote("early stopping", enough, self._vote)
        if enough:
            what = self._metric or "the monitor"
            ctx.request.stop(f"early stopping: {what} has not improved {self.bad_checks} times")

    def state_dict(self) -> dict[str, Any]:
        return {} if self._judge is not None else self._judged() | {"weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and self._take_up(state):
            self._weights = {plain_name(name): t for name, t in state["weights"].items()}

    def rank_state_dict(self) -> dict[str, Any]:
        return {} if self._judge is None else self._judged()  # each rank by its own value

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        self._take_up(state)

    def _judged(self) -> dict[str, Any]:
        return {"best": self.best, "bad_checks": self.bad_checks, "judges_by": self._judges_by}

    def _take_up(self, state: dict[str, Any]) -> bool:
        """Takes up what was judged, unless by something else: numbers that do not compare."""
        then = state.get("judges_by", self._judges_by)
        if then != self._judges_by:
            there, here = (
                f"{what or 'a function'} ({mode})" for what, mode in (then, self._judges_by)
            )
            self._told_later = f"EarlyStopping: {there} there, {here} here: it judges anew"
            return False
        self.best, self.bad_checks = state["best"], state["bad_checks"]
        return True


def _tensors(ctx: Context) -> dict[str, Tensor]:
    return {n: t for n, t in named_state(ctx.model).items() if isinstance(t, Tensor)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in tensors.items()}
