"""Training figures, from one report to the next, and from one epoch's beginning to its end."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dtrain.context import Context, Outbox, Step
from dtrain.distributed import Replicas, World
from dtrain.metrics import Means
from dtrain.step.lane import Lane, Verdict
from dtrain.step.precision import Precision
from dtrain.watchdog import SECONDS_METRIC, StragglerClock


@dataclass(eq=False)
class Figures:
    """Adds up what steps came to, and agrees on it. Ranks: all; local but for :meth:`agree`."""

    context: Context
    outbox: Outbox  # what hooks have logged
    world: World
    lanes: dict[str, Lane]  # by update; "" where a step has one
    precision: Precision
    replicas: Replicas
    clock: StragglerClock

    def __post_init__(self) -> None:
        self.means = Means(
            "train", self.context.device, names=[SECONDS_METRIC], counts=self.world.counts
        )
        #: Since the last report, by update: loss and weight, both agreed.
        self._losses = {name: [0.0, 0.0] for name in self.lanes}
        self._names = {name: f"train/{name}/loss".replace("//", "/") for name in self.lanes}
        self.counted = False  # whether anything weighed something since
        self.epoch_sums: dict[str, list[float]] = {}  # since the epoch began: of means, and weights
        self.rates: list[Any] = []  # by group, the learning rates of the newest step
        self._warned_nonfinite = False

    def restart(self) -> None:
        """Begins a fit."""
        self.means.drop()
        self._warned_nonfinite = False

    def count(self, step: Step, verdict: Verdict) -> None:
        """Counts a step, of which all ranks know now what became."""
        context = self.context
        if not step.done[1:]:
            context.progress.samples += verdict.samples
        self.lanes[step.update].observe(verdict)
        # A step that was left out for its loss must not make the whole report's loss NaN.
        left_out = bool(step.vetoed) if step.held is None else step.left_out()
        if left_out:
            self.outbox.add("vetoed", 1 / self.world.size, "sum")
        if verdict.weight > 0 and not (left_out and verdict.nonfinite):
            loss_sum, self.counted = verdict.loss_mean * verdict.weight, True
            of_epoch = self.epoch_sums.setdefault(self._names[step.update], [0.0, 0.0])
            for sums in (self._losses[step.update], of_epoch):
                sums[0] += loss_sum
                sums[1] += verdict.weight
        if verdict.nonfinite and not self._warned_nonfinite:
            self._warned_nonfinite = True
            whose = f" of update {step.update!r}" * bool(step.update)
            context.say(f"warning: the loss{whose} is not finite at step {step.number}")
        result = step.result  # of this update
        looked_at = self.precision.scales_loss and verdict.weight > 0 and not left_out
        if looked_at and result and (note := self.precision.watch(applied=result.applied)):
            context.say(note)
        if verdict.skipped:
            self.outbox.add("skipped", verdict.skipped / self.world.size, "sum")

    def agree(self, check_alike: Callable[[], None], asked: int = 0) -> dict[str, float]:
        """Returns figures since the last report; tells of a straggler. Ranks: all, communicates.

        How often all ranks have ``asked`` is in ``means.asked``.

        Where the models differ, ``check_alike`` may know why, and raise that.
        """
        context = self.context
        for name, logged in self.outbox.logged.items():
            self.means.add_logged(name, logged.values, logged.reduce)
        self.outbox.logged.clear()
        losses = {self._names[name]: sums for name, sums in self._losses.items() if sums[1]}
        values = {name: total / weight for name, (total, weight) in losses.items()}
        self._losses, self.counted = {name: [0.0, 0.0] for name in self.lanes}, False
        self.means.add(SECONDS_METRIC, self.clock.seconds, 1)
        mark = self.replicas.mark(context.progress.step)
        values |= self.means.agree(context.comm, mark, asked)
        if missed := self.means.missed():
            context.say(missed)
        for name, (total, weight) in self.means.pairs.items():
            if name.startswith("train/"):
                sums = self.epoch_sums.setdefault(name, [0.0, 0.0])
                self.epoch_sums[name] = [sums[0] + total, sums[1] + weight]
        if self.means.parted:
            check_alike()
            if note := self.replicas.tell(f"at step {context.progress.step}"):
                context.say(note)
        if straggler := self.clock.compare(values.pop(SECONDS_METRIC)):
            context.say(f"warning: {straggler}")
        if values:
            values |= self._learning_rates()
            values |= self.precision.values()
            if self.precision.scales_loss:  # some steps are not applied
                values["updates"] = context.progress.updates
        return values

    def _learning_rates(self) -> dict[str, float]:
        """Returns each group's, by its name or number; the first's in any case as ``lr``."""
        rates: dict[str, float] = {}
        known = iter(self.rates)
        for update in self.lanes:
            groups = self.context.optimizer_of(update or None).param_groups
            first = f"lr/{update}" if update else "lr"
            for number, (group, rate) in enumerate(zip(groups, known, strict=False)):
                name = f"lr/{update}/{number}" if update else f"lr/{group.get('name', number)}"
                if rate is not None and not number:
                    rates[first] = float(rate)
                if rate is not None and (number or "name" in group) and len(groups) > 1:
                    rates[f"lr/{number}" if name in rates else name] = float(rate)
        return rates

    def end_epoch(self) -> dict[str, float]:
        """Returns figures of the epoch, as ``epoch/...``: NaN where nothing weighed anything."""
        for name in self._names.values():
            self.epoch_sums.setdefault(name, [0.0, 0.0])
        sums, self.epoch_sums = self.epoch_sums, {name: [0.0, 0.0] for name in self.epoch_sums}
        means = {n: total / weight if weight else math.nan for n, (total, weight) in sums.items()}
        self.context._take(means)
        return {_of_epoch(name): mean for name, mean in means.items()}

    def restore_epoch(self, sums: dict[str, list[float]] | None) -> None:
        """Takes up an epoch's sums; None where older code saved none, and judged by the newest."""
        if sums is not None:
            self.epoch_sums = sums
        else:
            known = self.context.metrics
            known |= {_of_epoch(name): v for name, v in known.items() if name.startswith("train/")}


def _of_epoch(name: str) -> str:
    return name.replace("train/", "epoch/", 1)
