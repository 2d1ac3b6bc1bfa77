"""Learning-rate schedules: torch's own schedulers, stepped once and only once."""

from typing import Any, Literal

from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from dtrain.callback import Callback
from dtrain.callbacks.argument_checks import check_choice, find_metric
from dtrain.context import Context, Step
from dtrain.errors import ConfigError
from dtrain.schedules import Schedule


class LRSchedule(Callback):
    """Steps one of torch's schedulers, once an optimizer step or once an epoch.

    Never more often on more ranks, nor with accumulation. Steps that were left out (a loss
    scale overflowed, every rank skipped) are not counted. ``ReduceLROnPlateau`` is stepped
    with an agreed metric, so that all ranks decide alike: with ``eval/...`` after each evaluation,
    with the epoch's mean of ``train/...`` at the end of each epoch.
    Example: ``LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, steps), every="step")``.

    Args:
        scheduler: a scheduler of the Trainer's optimizer; or a function from the optimizer and how
            often it will be stepped in all (optimizer steps, or epochs; ConfigError where that is
            not known, and on resuming where a one-cycle schedule was planned for fewer) to one.
        every: ``"step"`` or ``"epoch"``.
        monitor: the metric for ``ReduceLROnPlateau``, such as ``"eval/loss"``.
    """

    late_step_end = True  # only the next update needs the new rate

    def __init__(
        self,
        scheduler: LRScheduler | Schedule,
        *,
        every: Literal["step", "epoch"] = "step",
        monitor: str | None = None,
    ) -> None:
        check_choice("LRSchedule", "every", every, ("step", "epoch"))
        if not isinstance(scheduler, LRScheduler) and not callable(scheduler):
            raise ConfigError(
                f"LRSchedule: {scheduler!r} is neither a scheduler nor a function (optimizer, "
                "total_steps) -> scheduler"
            )
        self._given = scheduler
        self._every = every
        self._monitor = monitor
        self.monitors = () if monitor is None else (monitor,)
        self._scheduler: LRScheduler | None = None
        self._total: int | None = None
        self._groups = 0  # of the optimizer, for which the scheduler was made

    def on_fit_start(self, ctx: Context) -> None:
        if self._scheduler is not None and self._scheduler.optimizer is ctx.optimizer:
            return  # a second fit goes on
        scheduler = self._given
        if not isinstance(scheduler, LRScheduler):
            by_step, progress = self._every == "step", ctx.progress
            self._total = progress.total_steps if by_step else progress.total_epochs
            if self._total is None:
                raise ConfigError(
                    f"LRSchedule(every={self._every!r}) needs to know how many "
                    f"{self._every}s there will be: pass max_steps to fit (for every='epoch', "
                    "epochs), or a scheduler instead of a function"
                )
            scheduler = scheduler(ctx.optimizer, self._total)
        if not isinstance(scheduler, LRScheduler):
            raise ConfigError(f"LRSchedule: the function returned {scheduler!r}, no scheduler")
        if scheduler.optimizer is not ctx.optimizer:
            raise ConfigError("LRSchedule: the scheduler must be of the Trainer's own optimizer")
        if isinstance(scheduler, ReduceLROnPlateau) != (self._monitor is not None):
            raise ConfigError(
                "LRSchedule: ReduceLROnPlateau needs monitor='eval/loss' or another metric, and no "
                "other scheduler takes one"
            )
        self._scheduler, self._groups = scheduler, len(ctx.optimizer.param_groups)

    def on_step_end(self, ctx: Context, step: Step) -> None:
        if self._every == "step" and step.applied:
            self._advance()

    def on_epoch_end(self, ctx: Context) -> None:
        if self._every == "epoch":
            self._advance()
        self._judge("train/", ctx.metrics)

    def on_eval_end(self, ctx: Context, metrics: dict[str, float]) -> None:
        if ctx.in_fit:
            self._judge("eval/", metrics)

    def _judge(self, kind: str, metrics: dict[str, float]) -> None:
        name = self._monitor or ""
        if isinstance(self._scheduler, ReduceLROnPlateau) and name.startswith(kind):
            self._scheduler.step(find_metric("LRSchedule", name, metrics))

    def _advance(self) -> None:
        if self._scheduler is None or self._monitor is not None:
            return
        groups = len(self._scheduler.optimizer.param_groups)
        if groups != self._groups:
            raise ConfigError(
                f"LRSchedule: the optimizer has {groups} groups, and the scheduler was made for "
                f"{self._groups}. Put what is added during a run into a group that there is: "
                "ctx.optimizer.param_groups[0]['params'].append(parameter)"
            )
        self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        if self._scheduler is None:
            return {}
        return {"scheduler": self._scheduler.state_dict(), "total": self._total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        planned, total = state.get("total") or 0, self._total or 0
        if 0 < planned < total and isinstance(self._scheduler, OneCycleLR):
            raise ConfigError(
                f"LRSchedule: the one-cycle schedule was planned for {planned} {self._every}s and "
                f"cannot go on for {total}: its cycle is over. Begin anew "
                "(resume='never'), or continue with the epochs it was planned for"
            )
        if "scheduler" in state and self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
            # The optimizer has stepped, in the process that made the checkpoint; torch would warn.
            self._scheduler.optimizer._opt_called = True  # type: ignore[attr-defined]
