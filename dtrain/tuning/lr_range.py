"""A learning-rate range test: the loss at rates that grow from step to step."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.callback import Callback
from dtrain.context import Context, Key, Step, has_updates
from dtrain.data import Data
from dtrain.errors import ConfigError, LossError
from dtrain.trainer import Trainer
from dtrain.tuning.attempt import attempt, begin, shaping
from dtrain.tuning.snapshot import set_value

_CALL = "lr_range_test"
_KEEP = 0.9  # of the loss before, in the smoothed one
_WIDTH, _HEIGHT, _EDGE = 640, 360, 48


@dataclass(frozen=True, slots=True)
class LRRange:
    """What a range test has found, equal on all ranks.

    Attributes:
        rates: the learning rate of each step; of several groups, the first one's.
        losses: the loss of each step, over the global batch.
        smoothed: the same, averaged exponentially.
        suggestion: the rate at which the smoothed loss falls fastest; None where it does not fall.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float | None

    def svg(self) -> str:
        """Returns a picture of the curve: the loss over the rate, which grows by factors."""
        across = [math.log10(rate) for rate in self.rates]
        low, high = min(self.smoothed), max(self.smoothed)
        left, wide = across[0], (across[-1] - across[0]) or 1.0

        def x(power: float) -> float:
            return round(_EDGE + (_WIDTH - 2 * _EDGE) * (power - left) / wide, 1)

        def y(loss: float) -> float:
            part = (min(max(loss, low), high) - low) / ((high - low) or 1.0)
            return round(_HEIGHT - _EDGE - (_HEIGHT - 2 * _EDGE) * part, 1)

        def line(losses: list[float], style: str) -> str:
            points = " ".join(f"{x(a)},{y(b)}" for a, b in zip(across, losses, strict=True))
            return f'<polyline fill="none" {style} points="{points}"/>'

        def words(at_x: float, at_y: float, text: str) -> str:
            return f'<text x="{at_x}" y="{at_y}" text-anchor="middle">{text}</text>'

        powers = range(math.ceil(across[0]), math.floor(across[-1]) + 1)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
            line(self.losses, 'stroke="#bbb"'),
            line(self.smoothed, 'stroke="#06c" stroke-width="2"'),
            *(words(x(power), _HEIGHT - _EDGE / 2, f"1e{power}") for power in powers),
            words(_EDGE / 2, y(low), f"{low:.3g}"),
            words(_EDGE / 2, y(high), f"{high:.3g}"),
        ]
        if self.suggestion is not None:
            at = x(math.log10(self.suggestion))
            parts.append(f'<path stroke="#c30" d="M{at} {_EDGE}V{_HEIGHT - _EDGE}"/>')
            parts.append(words(at, _EDGE - 8, f"{self.suggestion:.2g}"))
        return "\n".join([*parts, "</svg>", ""])


def lr_range_test(
    trainer: Trainer,
    train: Any,
    *,
    batch_size: int | None = None,
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
    optimizer: Key | None = None,
    picture: str | Path | None = None,
) -> LRRange:
    """Trains for some steps at rates that grow from ``start`` to ``end``, and puts all back.

    It stops where the loss is no number, or, smoothed, four times its smallest (Smith, 2017:
    "Cyclical Learning Rates for Training Neural Networks", section 3.3). Model and optimizer are
    as before.

    Example::

        found = dtrain.lr_range_test(trainer, train_set, batch_size=64, picture="rates.svg")

    Args:
        trainer: one that has not trained yet. Its precision, accumulation, ``Freeze``, and
            callbacks that change batches, losses or gradients take part; schedules and guards do
            not.
        train: as for ``fit``.
        batch_size: as for ``fit``.
        start: the first rate. Of several groups with different rates the first one's; the others'
            keep their proportion to it.
        end: the last rate.
        steps: how many there are; epochs follow one another as needed.
        optimizer: which of several optimizers, by its name or place; the others keep their rates.
            All of a list if None. Of a dict it must be one, whose update's loss is looked at.
        picture: where to draw the curve, an SVG file.

    Raises:
        ConfigError: the Trainer has trained already, or an argument is out of range.
        LossError: the loss is no number in the first step already, or all steps were skipped.

    Ranks: all, communicates; rank 0 draws.
    """

    def take() -> Data:
        if not 0 < start < end < math.inf or steps < 2:
            raise ConfigError(
                f"lr_range_test(start={start}, end={end}, steps={steps}): rates above 0 that grow, "
                "in 2 steps or more"
            )
        trainer.context.optimizer_of(optimizer)  # there is one
        if optimizer is None and has_updates(trainer.optimizer):
            names = " or ".join(f"optimizer={name!r}" for name in trainer.context.optimizers)
            raise ConfigError(
                "lr_range_test: each of several losses has a curve, and a rate, of its own: pass "
                f"{names}; the others then keep their rates"
            )
        return Data.of(train, batch_size, shuffle=True)

    data = begin(trainer, _CALL, take)
    sweep = _Sweep(start, end, steps, optimizer)
    shapes = shaping(trainer)
    with attempt(trainer, _CALL, [*shapes, sweep]) as tried, _stream_kept(data):
        tried.fit(data, max_steps=steps, log_every=steps, history=1)
    if not sweep.losses:
        why = sweep.why or "all steps were skipped"
        raise LossError(
            f"lr_range_test: there is no curve, for {why}. That is not the rate's doing: "
            "look at the data, the model and the loss (NonFiniteGuard names the module it is from)"
        )
    found = LRRange(sweep.rates, sweep.losses, sweep.smoothed, sweep.suggestion())
    if picture is not None:
        path = Path(picture).expanduser()
        draw = lambda: path.write_text(found.svg(), encoding="utf-8")  # noqa: E731
        trainer.world.comm.on_main(f"{_CALL}: picture", draw)
    return found


@contextmanager
def _stream_kept(data: Data) -> Iterator[None]:
    """A block after which a stream with a state is where it was."""
    stream = data.dataset
    if not (
        data.is_stream and hasattr(stream, "state_dict") and hasattr(stream, "load_state_dict")
    ):
        yield
        return
    before = copy.deepcopy(stream.state_dict())
    try:
        yield
    finally:
        stream.load_state_dict(before)


class _Sweep(Callback):
    """Sets the rate of each step, and keeps its loss, which is agreed."""

    def __init__(self, start: float, end: float, steps: int, optimizer: Key | None) -> None:
        self._optimizer = optimizer
        self._start, self._factor = start, (end / start) ** (1 / (steps - 1))
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.why = ""  # there may be no curve
        self._sum = self._weight = 0.0
        self._parts: Sequence[float] = ()

    def on_fit_start(self, ctx: Context) -> None:
        rates = [float(group["lr"]) for group in self._groups(ctx)]
        self._parts = [rate / rates[0] if rates[0] else 1.0 for rate in rates]

    def on_step_start(self, ctx: Context, step: Step) -> None:
        for group, part in zip(self._groups(ctx), self._parts, strict=True):
            set_value(group, "lr", self._rate(step.number) * part)

    def _groups(self, ctx: Context) -> list[dict[str, Any]]:
        return ctx.optimizer_of(self._optimizer).param_groups

    def _rate(self, step: int) -> float:
        rate: float = self._start * self._factor**step
        return rate

    def on_step_end(self, ctx: Context, step: Step) -> None:
        result: Any = step
        if has_updates(ctx.optimizer):  # the step's first update of that optimizer, if it has one
            result = next((one for name, one in step.done if name == self._optimizer), None)
        if result is None or not result.weight:
            return  # every rank skipped
        loss = result.loss_mean
        if not math.isfinite(loss):
            self.why = (
                self.why or f"at the first rate, {self._rate(step.number):g}, the loss is {loss}"
            )
            ctx.request.stop("the loss is no number")
            return
        self._sum, self._weight = _KEEP * self._sum + loss, _KEEP * self._weight + 1
        self.rates.append(self._rate(step.number))
        self.losses.append(loss)
        self.smoothed.append(self._sum / self._weight)
        best = min(self.smoothed)
        if self.smoothed[-1] > best + 3 * abs(best):
            ctx.request.stop("the loss has grown to four times its smallest")

    def suggestion(self) -> float | None:
        """Returns the rate of the steepest descent, before the smallest loss."""
        if len(self.smoothed) < 3:
            return None
        end = max(self.smoothed.index(min(self.smoothed)), 1)
        falls = [b - a for a, b in zip(self.smoothed, self.smoothed[1 : end + 1], strict=False)]
        steepest = min(range(len(falls)), key=falls.__getitem__)
        return self.rates[steepest] if falls[steepest] < 0 else None
