"""What LRSchedule asks of torch's schedulers, and of the optimizers that they turn."""

import inspect
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dtrain.context import Context, Key
from dtrain.errors import ConfigError


def owner_of(given: object, key: Key | None, ctx: Context) -> Optimizer:
    """Returns which optimizer is meant: that of a scheduler that is given, or of that key."""
    if key is None and isinstance(given, LRScheduler):
        own = given.optimizer
        return own if any(own is one for one in ctx.optimizers.values()) else ctx.optimizer
    return ctx.optimizer_of(key)


def check_owner(scheduler: LRScheduler, optimizer: Optimizer) -> None:
    """Raises ConfigError where a scheduler is of another optimizer."""
    if scheduler.optimizer is not optimizer:
        raise ConfigError(
            "LRSchedule: the scheduler must be of the Trainer's own optimizer. Where that was set "
            "to another one, pass a function: LRSchedule(lambda opt, steps: StepLR(opt, 30))"
        )


def check_takes_length(given: Any) -> None:
    """Raises ConfigError where the total would be an error, or be taken for another argument."""
    try:
        names = list(inspect.signature(given).parameters)
        inspect.signature(given).bind(None, 1)
    except ValueError:
        return  # written in C
    except TypeError:
        names = []
    if not names or (isinstance(given, type) and names[1] not in ("T_max", "total_iters")):
        name = getattr(given, "__name__", "...")
        given_as = f"it takes {names[1]!r} there" if names else "this does not take two"
        raise ConfigError(
            f"LRSchedule({name}): a function is called with the optimizer and how often it will be "
            f"stepped in all, and {given_as}: pass `lambda opt, total: "
            f"{name if isinstance(given, type) else '...'}(opt, ...)`"
        )


def rates_of(optimizer: Optimizer) -> list[float]:
    """Returns each group's rate, before any schedule."""
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


def lrs_of(optimizer: Optimizer) -> list[float]:
    """Returns each group's rate, as it is now."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def put_back(optimizer: Optimizer, rates: list[float], left: list[float]) -> None:
    """Gives groups their own rates, for another curve, where a curve has left its last in them.

    Where somebody has set another since, that is meant.
    """
    for group, rate, last in zip(optimizer.param_groups, rates, left, strict=False):
        if float(group["lr"]) == last:
            put(group, "lr", group.get("initial_lr", rate))
        group.pop("initial_lr", None)


def new_rates(optimizer: Optimizer) -> list[float] | None:
    """Returns the rates that ``fit`` was told to set since a schedule was made, if it was."""
    known = all("initial_lr" in group for group in optimizer.param_groups)
    return None if known else rates_of(optimizer)


def plain(group: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns a group's values, without its parameters."""
    return [(name, value) for name, value in group.items() if name != "params"]


def put(group: dict[str, Any], name: str, value: Any) -> None:
    """Sets a value; a tensor stays the same tensor, which others may hold."""
    if isinstance(old := group.get(name), Tensor):
        old.fill_(value)
    else:
        group[name] = value


def has_stepped(optimizer: Optimizer) -> None:
    """Keeps a scheduler from the warning that it is stepped before the optimizer."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def in_words(rates: list[float]) -> str:
    """Returns the groups' rates; one, where all have the same."""
    return ", ".join(f"{rate:.4g}" for rate in (rates if len(set(rates)) > 1 else rates[:1]))
