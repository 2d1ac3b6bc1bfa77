"""A guard against loss spikes: a step that is far above the last ones is not applied."""

import sys
from collections import deque
from statistics import median
from typing import Any, Literal

import torch

from dtrain.callback import Callback
from dtrain.callbacks.argument_checks import check_choice, check_counts, check_positive
from dtrain.context import Context, Step, has_updates
from dtrain.errors import ConfigError


class LossSpikeGuard(Callback):
    """Leaves a step out, stops or warns where the loss jumps above the last steps' losses.

    A loss is a spike if it is more than ``median + factor * spread`` of the last ``window``
    losses, where ``spread = 1.4826 * median(|loss - median|)``: the standard deviation, for
    normal noise, but not moved by single outliers (Iglewicz and Hoaglin, "How to Detect and
    Handle Outliers", 1993). A spread below 1 % of the median counts as 1 %. NaN is a spike.
    (OLMo-core's ``SkipStepOptimizer`` has these defaults, with mean and standard deviation.)

    The loss is the global batch's, so all ranks decide alike, once the window is full. On CUDA the
    device decides, and a spike is told of, or a stop asked for, a step later. A spike
    that is skipped is not taken into the window; BatchNorm statistics have seen its batch.

    Args:
        factor: how many spreads above the median are borne.
        window: how many losses are looked back at.
        action: ``"skip"``: the step's update is not applied; ``"stop"``: nor is it, and the
            run stops after the next step; ``"warn"``: only tell.
        patience: after how many skipped spikes in a row the run stops; None bears any number.
        optimizer: of several with updates of their own, whose loss it is; a guard for each.
    """

    asks_for_gradients = True  # it never looks
    late_step_end = True

    def __init__(
        self,
        factor: float = 6.0,
        *,
        window: int = 128,
        action: Literal["skip", "stop", "warn"] = "skip",
        patience: int | None = 10,
        optimizer: str | None = None,
    ) -> None:
        check_positive("LossSpikeGuard", factor=factor)
        check_counts("LossSpikeGuard", least=2, window=window)
        check_choice("LossSpikeGuard", "action", action, ("skip", "stop", "warn"))
        check_counts("LossSpikeGuard", or_none=True, patience=patience)
        self._factor = factor
        self._window = window
        self._action = action
        self._patience = patience
        self.losses: deque[float] = deque(maxlen=window)
        self.spikes_in_a_row = 0
        self._bound = 0.0  # of the step under way
        self._flag = 0
        self._optimizer = optimizer
        if optimizer is not None:
            self.name = f"LossSpikeGuard({optimizer!r})"

    def on_fit_start(self, ctx: Context) -> None:
        ctx.optimizer_of(self._optimizer)  # there is one
        if self._optimizer is None and has_updates(ctx.optimizer):
            raise ConfigError(
                "LossSpikeGuard: each update has a loss of its own. Say whose, such as "
                f"LossSpikeGuard(optimizer={next(iter(ctx.optimizers))!r}), in a guard for each"
            )

    def on_grads_ready(self, ctx: Context, step: Step) -> None:
        if step.update and step.update != self._optimizer:
            return
        self._bound = self.bound()
        if ctx.reads_at_once:
            self._judge(ctx, step, is_spike=not step.loss_mean <= self._bound)
        elif self._action != "warn":
            loss = step.mean_loss()
            is_borne = loss <= min(self._bound, torch.finfo(loss.dtype).max)  # NaN is not
            self._flag = step.veto_where(is_borne.logical_not().float())

    def on_step_end(self, ctx: Context, step: Step) -> None:
        if ctx.reads_at_once:
            return
        if self._action == "warn":
            self._judge(ctx, step, is_spike=not step.loss_mean <= self._bound)
        else:
            self._judge(ctx, step, is_spike=step.left_out(self._flag))

    def _judge(self, ctx: Context, step: Step, *, is_spike: bool) -> None:
        if not step.weight:
            return  # every rank skipped: there is no loss to judge
        loss, bound = step.loss_mean, self._bound
        if not is_spike:
            self.spikes_in_a_row = 0
            self.losses.append(loss)
            return
        self.spikes_in_a_row += 1
        whose = f" of update {step.update!r}" * bool(step.update)
        why = f"step {step.number}: the loss {loss:.4g}{whose} is above {bound:.4g}, a spike"
        if self._action == "warn":
            if loss < float("inf"):  # a lasting new level becomes the window's, in time
                self.losses.append(loss)
            if self.spikes_in_a_row == 1:
                ctx.say(f"warning: {why}")
            return
        if ctx.reads_at_once:
            step.veto(why)
        if self._action == "stop":
            ctx.request.stop(why)
        elif self.spikes_in_a_row == self._patience:
            ctx.request.stop(f"{why}, number {self.spikes_in_a_row} in a row")
        else:
            ctx.say(f"{why}; its update is left out")

    def bound(self) -> float:
        """Returns what a loss may be; any that is finite, where the window is not full."""
        if len(self.losses) < self._window:
            return sys.float_info.max
        middle = median(self.losses)
        spread = 1.4826 * median(abs(loss - middle) for loss in self.losses)
        least = 0.01 * abs(middle)  # a window of equal losses has a spread of 0
        return middle + self._factor * max(spread, least)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "spikes_in_a_row": self.spikes_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = deque(state["losses"], maxlen=self._window)
        self.spikes_in_a_row = state["spikes_in_a_row"]
