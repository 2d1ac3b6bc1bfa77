"""Checks of what a callback was given, which complain in the same words everywhere."""

from collections.abc import Mapping, Sequence
from numbers import Integral

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


def find_metric(owner: str, name: str, metrics: Mapping[str, float]) -> float:
    """Returns the metric of that name; raises ConfigError where there is none."""
    if name not in metrics:
        known = ", ".join(sorted(metrics)) or "none"
        raise ConfigError(f"{owner}: no metric {name!r}; there are {known}")
    return metrics[name]


def some_of(names: Sequence[str], most: int) -> str:
    """Returns the first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
