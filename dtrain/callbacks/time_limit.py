"""A limit of wall-clock time, agreed by all ranks."""

import re
import time
from collections.abc import Callable
from typing import Literal

from dtrain.callback import Callback
from dtrain.callbacks.argument_checks import check_choice
from dtrain.context import Context, Step
from dtrain.errors import ConfigError

_UNITS_S = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_LIMIT = re.compile("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in _UNITS_S))


class TimeLimit(Callback):
    """Ends the run once ``fit`` has run for so long.

    Each rank looks at its own clock after every step and evaluation; where it is over on one,
    all leave after the same step. The clock starts anew with each ``fit``, also on a resume.
    Example: ``TimeLimit("3h50m", then="preempt")``, in a job of 4 hours that the next continues.

    Args:
        limit: seconds, or text such as ``"1d2h3m4s"``, ``"90m"`` or ``"1.5h"``.
        margin_s: ask so many seconds earlier, to leave time for a last evaluation and checkpoint.
        then: ``"stop"``: the run is finished; ``"preempt"``: saved, for another start to continue.
        clock: returns seconds; for tests.
    """

    def __init__(
        self,
        limit: str | float,
        *,
        margin_s: float = 0.0,
        then: Literal["stop", "preempt"] = "stop",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_choice("TimeLimit", "then", then, ("stop", "preempt"))
        self._limit = limit
        self._seconds = parse_duration(limit) - margin_s
        if margin_s < 0 or not self._seconds > 0:
            raise ConfigError(
                f"TimeLimit({limit!r}, margin_s={margin_s}): the limit must be more than 0, and "
                "the margin less than the limit"
            )
        self._then = then
        self._clock = clock

    def on_fit_start(self, ctx: Context) -> None:
        self._end = self._clock() + self._seconds
        self._asked = False

    def on_step_end(self, ctx: Context, step: Step) -> None:
        self._look(ctx)

    def on_eval_end(self, ctx: Context, metrics: dict[str, float]) -> None:
        if ctx.in_fit:
            self._look(ctx)  # it may have taken longer than all steps before it

    def _look(self, ctx: Context) -> None:
        if self._asked or self._clock() < self._end:
            return
        self._asked = True
        ask = ctx.request.preempt if self._then == "preempt" else ctx.request.stop
        ask(f"time limit of {self._limit if isinstance(self._limit, str) else f'{self._limit:g}s'}")


def parse_duration(text: str | float) -> float:
    """Returns seconds: of a number, or of text such as ``"1d2h3m4s"``; or raises ConfigError."""
    if not isinstance(text, str):
        return float(text)
    match = _LIMIT.fullmatch(text.strip().lower())
    if match is None or not any(match.groups()):
        raise ConfigError(
            f"{text!r} is no duration: write days, hours, minutes and seconds in this order, such "
            "as '1d2h3m4s', '90m' or '3h50m', or a number of seconds"
        )
    pairs = zip(match.groups(), _UNITS_S.values(), strict=True)
    return sum(float(number or 0) * seconds for number, seconds in pairs)
