"""Checks of what a callback was given, which complain in the same words everywhere."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral

from dtrain.distributed import some_of as some_of
from dtrain.errors import ConfigError


def check_counts(
    owner: str, least: int = 1, *, or_none: bool = False, **values: float | None
) -> None:
    """Raises ConfigError where a value is no whole number from ``least`` on, nor None if it may."""
    for name, value in values.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not (or_none if value is None else whole and value >= least):
            kind, hint = "" if whole or value is None else "a whole number, ", ", or None" * or_none
            raise ConfigError(f"{owner}({name}={value!r}): must be {kind}{least} or more{hint}")


def check_positive(owner: str, **values: float | None) -> None:
    """Raises ConfigError where a value is not above 0; None is one that is not known."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{owner}({name}={value!r}): must be more than 0")


def check_choice(owner: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ConfigError where ``value`` is none of ``choices``."""
    if value not in choices:
        *others, last = map(repr, choices)
        raise ConfigError(f"{owner}({name}={value!r}): choose {', '.join(others)} or {last}")


def figure_of(monitor: str) -> str:
    """Returns the name of what is judged: of a ``train/...``, its mean over an epoch."""
    return monitor.replace("train/", "epoch/", 1) if monitor.startswith("train/") else monitor


def find_metric(owner: str, monitor: str, metrics: Mapping[str, float]) -> float:
    """Returns what is judged: an evaluation's figure, or an epoch's; NaN where it is not finite.

    Raises ConfigError where there is none.
    """
    name = figure_of(monitor)
    if name in metrics:
        value = float(metrics[name])
        return value if math.isfinite(value) else math.nan
    if name == monitor:
        known, hint = (
            sorted(metrics),
            "a callback that adds one stands before it in callbacks=[...]",
        )
    else:
        known = sorted(n.replace("epoch/", "train/", 1) for n in metrics if n.startswith("epoch/"))
        hint = "means of an epoch, which a torchmetrics object has not: judge that in an evaluation"
    raise ConfigError(
        f"{owner}: no metric {monitor!r}; there are {', '.join(known) or 'none'} ({hint})"
    )
