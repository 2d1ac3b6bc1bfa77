"""Learning-rate schedules: torch's own schedulers, stepped once and only once."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dtrain.callback import Callback
from dtrain.callbacks.argument_checks import check_choice, find_metric
from dtrain.callbacks.schedulers import (
    check_owner,
    check_takes_length,
    has_stepped,
    in_words,
    lrs_of,
    new_rates,
    owner_of,
    plain,
    put,
    put_back,
    rates_of,
)
from dtrain.context import Context, Key, Step, has_updates
from dtrain.errors import ConfigError
from dtrain.schedules import Schedule, made_of


class LRSchedule(Callback):
    """Steps one of torch's schedulers, once an optimizer step or once an epoch.

    Never more often on more ranks, nor with accumulation. Steps that were left out (a loss
    scale overflowed, every rank skipped) are not counted. ``ReduceLROnPlateau`` is stepped
    with an agreed metric, so that all ranks decide alike: ``eval/...`` after each evaluation, the
    epoch's mean of ``train/...`` at the end of each epoch.
    Example: ``LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, steps), every="step")``.

    Args:
        scheduler: a scheduler of the Trainer's optimizer; or a function from the optimizer and how
            often it will be stepped in all (optimizer steps, or epochs; ConfigError where that is
            not known) to one.
        every: ``"step"`` or ``"epoch"``.
        monitor: the metric for ``ReduceLROnPlateau``, such as ``"eval/loss"``.
        replan: what becomes of the curve where a fit goes on for longer or shorter than the
            function was told, with another rate (``fit(override={"lr": ...})``) or another
            scheduler. True: a new one, over what is left, from the optimizer's own rate. False: the
            old one; the rate stays what it is at its end. None: ConfigError, unless the curve is
            the same for both lengths. (Another fit of the script has a new curve in any case.)
        optimizer: which of several optimizers, by its name or place; all of them if None, or that
            of the scheduler that is given. Steps without its update count.
    """

    late_step_end = True  # only the next update needs the new rate

    def __init__(
        self,
        scheduler: LRScheduler | Schedule,
        *,
        every: Literal["step", "epoch"] = "step",
        monitor: str | None = None,
        replan: bool | None = None,
        optimizer: Key | None = None,
    ) -> None:
        check_choice("LRSchedule", "every", every, ("step", "epoch"))
        if not isinstance(scheduler, LRScheduler) and not callable(scheduler):
            raise ConfigError(
                f"LRSchedule: {scheduler!r} is neither a scheduler nor a function (optimizer, "
                "total_steps) -> scheduler"
            )
        if not isinstance(scheduler, LRScheduler):
            check_takes_length(scheduler)
        self._given = scheduler
        self._every = every
        self._monitor = monitor
        self.replan = replan
        self._optimizer = optimizer
        if optimizer is not None:
            self.name = f"LRSchedule({optimizer!r})"
        self.monitors = () if monitor is None else (monitor,)
        self._scheduler: LRScheduler | None = None
        self._groups = 0  # of the optimizer, for which the scheduler was made
        self._total: int | None = None  # how long the run was to be when the curve was made
        self._began = 0  # where the curve begins
        self._stepped = 0  # how far on it the scheduler is
        self._waits = 0  # how often it was not stepped, to stay at the curve's end
        self._asked: int | None = None  # how long the run is to be now
        self._rates: list[float] = []  # which it begins with, of each group
        self._skips = False  # the end of an epoch that was over when the curve was made
        self._made: dict[str, str] = {}  # of what, in words
        self._phase, self._left = 0, list[float]()  # of which fit the curve is, and how it ended
        # The groups as the scheduler made them, where a run may go on that had none.
        self._new: list[dict[str, Any]] = []

    def on_fit_start(self, ctx: Context) -> None:
        by_step, is_made = self._every == "step", isinstance(self._given, LRScheduler)
        progress = ctx.progress if is_made else ctx.progress.of_phase()  # it is of the whole run
        total = progress.total_steps if by_step else progress.total_epochs
        # Resumed where an epoch is over but for `on_epoch_end`, which comes next.
        self._ends = not by_step and progress.step_in_epoch == progress.steps_per_epoch
        self._done = progress.step if by_step else progress.epoch + self._ends
        self._say, self._asked = ctx.say, total
        owner = self._owner = owner_of(self._given, self._optimizer, ctx)
        new_phase, self._phase = self._phase != ctx.progress.phase, ctx.progress.phase
        scheduler = self._given
        if self._scheduler is not None and self._scheduler.optimizer is owner:
            if is_made or not new_phase:
                self._go_on(self._total, total, new_rates(owner))  # the fit is gone on with
                return
            put_back(owner, self._rates, self._left)
            self._began = self._stepped = self._waits = 0
        if isinstance(scheduler, LRScheduler):
            check_owner(scheduler, owner)
            self._refuse_short(scheduler)
            self._refuse_rates(new_rates(owner))
            self._tell_turn(scheduler)
        else:
            if total is None:
                raise ConfigError(
                    f"LRSchedule(every={self._every!r}) needs to know how many "
                    f"{self._every}s there will be: pass max_steps to fit (for every='epoch', "
                    "epochs), or a scheduler instead of a function"
                )
            if self._scheduler is not None and not new_phase:
                self._began, self._stepped = self._done, 0
                left = f"{total - self._done} {self._every}s of {total} left"
                ctx.say(f"LRSchedule: another optimizer, and a new curve, over the {left}")
            self._total, self._rates = total, rates_of(owner)
            scheduler = scheduler(owner, total - self._began)
        if not isinstance(scheduler, LRScheduler):
            raise ConfigError(f"LRSchedule: the function returned {scheduler!r}, no scheduler")
        check_owner(scheduler, owner)
        if isinstance(scheduler, ReduceLROnPlateau) != (self._monitor is not None):
            raise ConfigError(
                "LRSchedule: ReduceLROnPlateau needs monitor='eval/loss' or another metric, and no "
                "other scheduler takes one"
            )
        self._scheduler, self._groups = scheduler, len(owner.param_groups)
        self._made = self._words_of(scheduler)
        if has_updates(ctx.optimizer):
            has_stepped(owner)  # it may not for some steps, and the curve is of steps
        if progress.step and not self._began:  # nor begun above
            self._new = [dict(plain(group)) for group in owner.param_groups]

    def on_fit_end(self, ctx: Context) -> None:
        self._left = lrs_of(self._owner)

    def on_epoch_start(self, ctx: Context) -> None:
        if not self._new:
            return
        # The run that goes on had no schedule: nothing was loaded.
        made, self._new, total, owner = self._new, [], self._total, self._owner
        self._skips = self._ends and ctx.progress.of_phase().epoch < self._done
        where = "begins here"
        if isinstance(self._given, LRScheduler):
            for group, held in zip(owner.param_groups, made, strict=True):
                put(group, "lr", held["lr"])
                group |= {name: held[name] for name in held.keys() - group.keys()}
        elif self._monitor is None and total is not None and total > self._done:
            self._began, self._rates = self._done, rates_of(owner)
            where += f", over the {self._begin(total - self._done)} {self._every}s that are left"
        ctx.say(f"LRSchedule is new in this run: its {type(self._scheduler).__name__} {where}")

    def on_step_end(self, ctx: Context, step: Step) -> None:
        key = self._optimizer
        if self._every == "step" and (step.applied if key is None else step.applied_to(key)):
            self._advance()

    def on_epoch_end(self, ctx: Context) -> None:
        if self._every == "epoch" and not (self._skips or self._new):
            self._advance()
        self._judge("train/", ctx.metrics)
        self._skips = False

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
        length = self._total - self._began if self.replan is False and self._total else None
        if length is None or self._stepped < length - 1:
            self._scheduler.step()
            self._stepped += 1
        else:
            self._waits += 1

    def _go_on(
        self,
        planned: int | None,
        total: int | None,
        rates: list[float] | None,
        other: str = "",
    ) -> None:
        """Decides what becomes of a curve planned for another length, other rates, or otherwise."""
        scheduler, given = self._scheduler, self._given
        assert scheduler is not None
        if isinstance(given, LRScheduler):
            self._refuse_rates(rates)
            self._refuse_short(scheduler)
            self._tell_turn(scheduler)
        if isinstance(given, LRScheduler) or planned is None or self._monitor is not None:
            return  # nobody planned its length
        length, what = planned - self._began, f"{self._every}s"
        if total is None or (rates is None and not other and total == planned):
            return
        end, must_begin = "", rates is not None or bool(other)
        if not must_begin:
            longest = max(planned, total) - self._began
            curve = self._curve(length, longest)
            if curve == self._curve(total - self._began, longest):
                self._total, waits, self._waits = total, self._waits, 0
                for _ in range(waits):
                    self._advance()
                return
            end = in_words(curve[length - 1])
        left, begins = total - self._done, in_words(rates or self._rates)
        if other and left <= 0:
            return  # nothing is trained
        if self.replan is None or (must_begin and not self.replan):
            head = f"its curve was planned for {planned} {what}, and "
            if other:
                head = f"another scheduler is here ({other})"
            else:
                head += (
                    f"{total} are asked for"
                    if total != planned
                    else "another lr (or group) is there"
                )
            keep = f"; replan=False keeps the old one, and from its end on the rate stays {end}"
            raise ConfigError(
                f"LRSchedule: {head}, at {self._every} {self._done}. Say what becomes of it: "
                f"LRSchedule(..., replan=True) begins a new curve over the {left} {what} that are "
                f"left, from lr {begins}{keep * (not must_begin)}."
            )
        if self.replan and left > 0:
            was = f"another scheduler is here ({other})" if other else ""
            self._say(
                f"LRSchedule: {was or f'its curve was planned for {planned} {what}'}; a new one "
                f"begins, over the {left} that are left of {total}, from lr {begins}"
            )
            self._total, self._began, self._rates = total, self._done, rates or self._rates
            self._skips = self._ends
            self._begin(left)
        else:
            self._say(
                f"LRSchedule: its curve was planned for {planned} {what}, of {total} now; from its "
                f"end on the rate stays {end}"
            )
            if self._stepped >= length:  # one too far: no step had that rate
                for _ in range(self._begin(length) - 1):
                    self._advance()

    def _refuse_rates(self, rates: list[float] | None) -> None:
        """A scheduler that is made already has its rates; a ReduceLROnPlateau has none."""
        if rates is not None and self._monitor is None:
            raise ConfigError(
                f"fit(override=...) sets lr {in_words(rates)}, and LRSchedule's scheduler goes on "
                "from another: make it of an optimizer with that rate, or pass a function "
                "(optimizer, total_steps) -> scheduler, and replan=True"
            )

    def _refuse_short(self, scheduler: LRScheduler) -> None:
        """A one-cycle that is given, or an old one of it that is kept, may be over too soon."""
        length, total = getattr(scheduler, "total_steps", None), self._asked
        if length is not None and total is not None and length < total:
            raise ConfigError(
                f"LRSchedule: the {type(scheduler).__name__} is over after {length} "
                f"{self._every}s, and the run has {total}: make it longer, or pass a function "
                "(optimizer, total_steps) -> scheduler"
            )

    def _tell_turn(self, scheduler: LRScheduler) -> None:
        """A cosine that was made for fewer steps comes back up."""
        turn, total = getattr(scheduler, "T_max", None), self._asked
        if turn is not None and total is not None and turn < total:
            self._say(
                f"LRSchedule: the {type(scheduler).__name__} is at its lowest after {turn} "
                f"{self._every}s of {total}, and climbs back from there"
            )

    def _curve(self, length: int, upto: int) -> list[list[float]]:
        """Returns the groups' rates at each step of a curve of ``length``, until it raises."""
        assert self._scheduler is not None
        assert not isinstance(self._given, LRScheduler)
        optimizer = self._scheduler.optimizer
        twin = SGD([torch.zeros(1)], lr=0.0)
        twin.param_groups = [
            {k: v for k, v in group.items() if k[-2:] != "lr"}
            | {"params": [torch.zeros(1)], "lr": rate}
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True)
        ]
        twin.defaults = optimizer.defaults
        has_stepped(twin)
        scheduler, rates = self._given(twin, length), []
        for _ in range(upto + 1):
            rates.append([float(group["lr"]) for group in twin.param_groups])
            try:
                scheduler.step()
            except ValueError:  # a one-cycle schedule is over
                break
        return rates

    def _begin(self, length: int) -> int:
        """Makes the scheduler anew, at the beginning of a curve of ``length``, which it returns."""
        assert self._scheduler is not None
        assert not isinstance(self._given, LRScheduler)
        optimizer = self._scheduler.optimizer
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group.pop("initial_lr", None)
            put(group, "lr", rate)
        self._scheduler, self._stepped, self._waits = self._given(optimizer, length), 0, 0
        self._made = self._words_of(self._scheduler)
        self._groups = len(optimizer.param_groups)
        has_stepped(optimizer)
        return length

    def _load(self, state: dict[str, Any], length: int | None = None) -> str:
        """Takes up a scheduler's state, of a curve of ``length``; leaves the optimizer as it is.

        Returns in words what is another there, and then leaves that state; but that of a scheduler
        that was given, and is of other values: the old ones are kept.
        """
        assert self._scheduler is not None
        groups = self._scheduler.optimizer.param_groups
        kept = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in plain(g)} for g in groups]
        if length is not None:
            self._begin(length)
        for group, values in zip(groups, kept, strict=True):
            for name, value in values.items():
                put(group, name, value)
        there, here = state.get("made", self._made), self._made
        other = ", ".join(
            f"{name} {there[name]} there, {here[name]} here"
            for name in (there if there["kind"] == here["kind"] else ("kind",))
            if name in here and there[name] != here[name]
        )
        if other and self._monitor is not None:
            self._say(f"LRSchedule: {other}: the one here is used, and judges anew")
        elif other and length is None:
            if there["kind"] != here["kind"]:
                raise ConfigError(
                    f"LRSchedule: another scheduler is here ({other}): make it as it was, or pass "
                    "a function (optimizer, total_steps) -> scheduler, and replan=True"
                )
            self._say(f"LRSchedule: {other}: the old one is kept")
        if not other or (self._monitor is None and length is None):
            self._scheduler.load_state_dict(state["scheduler"])
        # The optimizer has stepped, in the process that made the checkpoint; torch would warn.
        has_stepped(self._scheduler.optimizer)
        return other

    def _words_of(self, scheduler: LRScheduler) -> dict[str, str]:
        given, total = isinstance(self._given, LRScheduler), self._total
        made = made_of(scheduler, 0 if given or total is None else total - self._began)
        return made | {"every": self._every} | ({"monitor": self._monitor} if self._monitor else {})

    def state_dict(self) -> dict[str, Any]:
        if self._scheduler is None:
            return {}
        return {
            "scheduler": self._scheduler.state_dict(),
            "total": self._total,
            "began": self._began,
            "rates": self._rates,
            "stepped": self._stepped,
            "waits": self._waits,
            "made": self._made,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "scheduler" not in state or self._scheduler is None:
            return
        self._new = []
        self._left = lrs_of(self._owner)
        planned, total = state.get("total"), self._total
        if not isinstance(self._given, LRScheduler) and planned is not None and total is not None:
            self._began, self._rates = state.get("began", 0), state.get("rates") or self._rates
            self._total, rates = planned, new_rates(self._scheduler.optimizer)
            other = self._load(state, planned - self._began)
            self._stepped = state.get("stepped", state["scheduler"].get("last_epoch", 0))
            self._waits = state.get("waits", 0)
            self._go_on(planned, total, rates, other)
        else:
            rates = new_rates(self._scheduler.optimizer)
            self._load(state)
            self._go_on(None, None, rates)
