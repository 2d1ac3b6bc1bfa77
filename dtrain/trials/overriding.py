"""Puts a variant's changes into what a script gives its Trainer, and says what each touched."""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from dtrain.callback import HOOK_NAMES, Callback
from dtrain.errors import ConfigError
from dtrain.trials.changes import Change, numbered

_MADE_OF = "_made_of"


def remember_arguments() -> None:
    """Has each callback that is made from now on know what it was made of."""

    def new(cls: type[Callback], *args: Any, **kwargs: Any) -> Callback:
        one = object.__new__(cls)
        vars(one)[_MADE_OF] = args, kwargs
        return one

    setattr(Callback, "__new__", new)  # noqa: B010 -- mypy knows that it is no method


def _made_of(one: Callback) -> tuple[Any, Any] | None:
    """Returns the arguments of a callback; None where they are not known."""
    if type(one).__new__ is not Callback.__new__:
        return None
    return vars(one).get(_MADE_OF)


def callback_names(callbacks: Sequence[Callback]) -> list[str]:
    """Returns how changes name these callbacks."""
    return numbered([type(one).__name__ for one in callbacks])


def override(
    changes: Sequence[Change], callbacks: Sequence[Callback]
) -> tuple[list[Callback], dict[str, Any], list[Change]]:
    """Returns the callbacks that are left, new values of the optimizer, and what touched nothing.

    Callbacks whose arguments change are made again in place: who holds one has the new one.
    """
    left, optimizer, idle = list(callbacks), {}, []
    for change in changes:
        owner, _, argument = change.what.rpartition(".")
        if change.kind == "set" and owner == "optimizer":
            optimizer[argument] = change.value
            continue
        found = _found(change.what if change.kind == "without" else owner, callbacks)
        if not found:
            idle.append(change)
        elif change.kind == "without":
            left = [one for one in left if not any(one is gone for gone in found)]
        elif len(found) > 1:
            raise ConfigError(
                f"{change}: there are {len(found)} of {owner}; say which: {owner}#1.{argument}=..."
            )
        else:
            _remake(found[0], argument, change)
    return left, optimizer, idle


def refuse(idle: Sequence[Change], callbacks: Sequence[Callback]) -> None:
    """Raises ConfigError for changes that touch nothing, with what there is."""
    names = callback_names(callbacks)
    for change in idle:
        owner = change.what if change.kind == "without" else change.what.rpartition(".")[0]
        close = difflib.get_close_matches(owner, [*names, *(n.partition("#")[0] for n in names)], 1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ConfigError(
            f"{change} touches nothing: the script's Trainer has no such callback{hint} It has "
            f"{', '.join(names) or 'none'}"
        )


def check(change: Change, callbacks: Sequence[Callback]) -> None:
    """Raises ConfigError where a change could not be made; makes none."""
    owner, _, argument = change.what.rpartition(".")
    if change.kind == "without" or owner == "optimizer":
        found = _found(change.what, callbacks) or owner == "optimizer"
    elif found := _found(owner, callbacks):
        _changed(found[0], argument, change)
    if not found:
        refuse([change], callbacks)


def check_optimizer(change: Change, optimizer: Optimizer) -> None:
    """Raises ConfigError where a change of the optimizer would touch nothing."""
    owner, _, name = change.what.rpartition(".")
    if change.kind != "set" or owner != "optimizer":
        return
    groups = optimizer.param_groups
    known = sorted({key for group in groups for key in group} - {"params", "initial_lr"})
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]}?" if close else "."
        raise ConfigError(
            f"{change} touches nothing: {type(optimizer).__name__} has no {name!r}{hint} It has "
            f"{', '.join(known)}"
        )
    old = [group[name] for group in groups if name in group]
    if all(type(one) is type(change.value) and one == change.value for one in old):
        raise ConfigError(f"{change} changes nothing: it is {old[0]!r} in the script, too")


def judged_by(callbacks: Sequence[Callback]) -> list[str] | None:
    """Returns the metric and mode by which the script itself says what is best, if it does."""
    for name in ("best", "monitor"):  # Checkpoint's, and then EarlyStopping's
        for one in callbacks:
            if (made_of := _made_of(one)) is None:
                continue
            args, kwargs = made_of
            made = inspect.signature(type(one)).bind(*args, **kwargs)
            made.apply_defaults()
            metric, mode = made.arguments.get(name), made.arguments.get("mode")
            if isinstance(metric, str) and mode in ("min", "max"):
                return [metric, str(mode)]
    return None


def _found(name: str, callbacks: Sequence[Callback]) -> list[Callback]:
    """Returns those of a class, or the one that ``EMA#2`` or the callback's own name says."""
    cls, _, number = name.partition("#")
    ofs = [one for one in callbacks if type(one).__name__ == cls]
    if number:
        return ofs[int(number) - 1 : int(number)]
    return ofs or [one for one in callbacks if getattr(one, "name", "") == name]


def _remake(one: Callback, argument: str, change: Change) -> None:
    args, kwargs = _changed(one, argument, change)
    # What a script has set since: its name, and hooks of its own.
    kept = {key: value for key, value in vars(one).items() if key in ("name", *HOOK_NAMES)}
    vars(one).clear()
    vars(one)[_MADE_OF] = args, kwargs
    type(one).__init__(one, *args, **kwargs)
    vars(one).update(kept)


def _changed(one: Callback, argument: str, change: Change) -> tuple[Any, Any]:
    """Returns the arguments that a callback was made of, with one of them changed."""
    if (made_of := _made_of(one)) is None:
        cls = type(one).__name__
        raise ConfigError(
            f"{change}: {cls} is made by a __new__ of its own, so its arguments are not known. "
            "Have the script take it as an argument of its own, and change that (--arg)"
        )
    args, kwargs = made_of
    made = inspect.signature(type(one)).bind(*args, **kwargs)
    made.apply_defaults()
    cls = type(one).__name__
    parameters = made.signature.parameters
    more = next((p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
    fixed = [n for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if argument not in fixed and more is None:
        close = difflib.get_close_matches(argument, fixed, 1)
        hint = f"; did you mean {close[0]}?" if close else "."
        has = ", ".join(f"{name}={made.arguments[name]!r}" for name in fixed)
        raise ConfigError(
            f"{change} touches nothing: {cls} has no argument {argument!r}{hint} It was made with "
            f"{has or 'none'}"
        )
    values = made.arguments if argument in fixed else made.arguments[str(more)]
    old, new = values.get(argument), change.value
    if isinstance(old, bool | int | float) and isinstance(new, str):
        raise ConfigError(
            f"{change}: {argument} is a number in the script ({old!r}), and {new!r} is none"
        )
    if type(old) is type(new) and old == new:
        raise ConfigError(f"{change} changes nothing: it is {old!r} in the script, too")
    values[argument] = new
    return made.args, made.kwargs
