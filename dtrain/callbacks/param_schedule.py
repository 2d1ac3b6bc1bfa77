"""A schedule for any number: weight decay, momentum, betas, a dropout rate, a temperature."""

import difflib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dtrain.callback import Callback
from dtrain.callbacks.argument_checks import some_of
from dtrain.context import Context, Key, Progress, Step
from dtrain.errors import ConfigError

Group = dict[str, Any]


class ParamSchedule(Callback):
    """Sets a value of the optimizer, or of a submodule, at the start of every step.

    The value is a function of the progress alone: equal on all ranks, with nothing to save, and a
    resumed run goes on exactly. What another callback set before (``LRSchedule`` the ``lr``) is
    overwritten.

    Example::

        ParamSchedule("weight_decay", lambda p: 0.1 * (1 - p.step / p.total_steps))
        ParamSchedule("betas", lambda p: (0.9, 0.95 if p.epoch else 0.999), group=0)
        ParamSchedule("dropout", lambda p: 0.3 if p.epoch < 5 else 0.1, module="body.drop:p")

    Args:
        name: what to set in the optimizer's groups: ``lr``, ``weight_decay``, ``momentum``,
            ``betas`` and so on. With ``module``: any name, to report the value as.
        fn: from the :class:`~dtrain.Progress` to the value; counted from the fit's beginning, where
            a script has several.
        group: only this parameter group: its place, its ``group["name"]``, or a function that
            says of each group whether it is meant; None means all groups.
        module: an attribute of a submodule instead, as ``"path.to.module:attribute"``.
        log: report the value, if it is a number, as ``name``, or as ``name/group``. (``lr`` is
            reported anyway.)
        optimizer: which of several optimizers, by its name or place; all of them if None.
    """

    def __init__(
        self,
        name: str,
        fn: Callable[[Progress], Any],
        *,
        group: int | str | Callable[[Group], bool] | None = None,
        module: str | None = None,
        log: bool = True,
        optimizer: Key | None = None,
    ) -> None:
        if not callable(fn):
            raise ConfigError(f"ParamSchedule({name!r}, {fn!r}): pass a function of the progress")
        of_groups = group is not None or optimizer is not None
        if module is not None and (of_groups or module.count(":") != 1):
            raise ConfigError(
                f"ParamSchedule({name!r}, group={group!r}, module={module!r}): module is "
                "'path.to.module:attribute', and cannot be combined with group or optimizer"
            )
        self._value_name = name
        self._fn = fn
        self._group = group
        self._module = module
        self._log = log and (module is not None or name != "lr")
        self._places: list[int] = []
        self._target: tuple[nn.Module, str] | None = None
        self._optimizer = optimizer
        self._label = name if optimizer is None else f"{name}/{optimizer}"
        self._label += "" if group is None else f"/{getattr(group, '__name__', group)}"
        # The name in checkpoints: a run may have several of these.
        self.name = f"ParamSchedule({module or self._label})"

    def on_fit_start(self, ctx: Context) -> None:
        if self._module is None:
            self._places = self._find_groups(ctx.optimizer_of(self._optimizer).param_groups)
            old = ctx.optimizer_of(self._optimizer).param_groups[self._places[0]][self._value_name]
        else:
            self._target = self._find_module(ctx.model, self._module)
            old = getattr(*self._target)
        value = self._value(ctx.progress)
        if isinstance(value, tuple) != isinstance(old, tuple):
            raise ConfigError(f"{self.name}: {value!r} cannot take the place of {old!r}")

    def on_step_start(self, ctx: Context, step: Step) -> None:
        value = self._value(ctx.progress)
        groups = ctx.optimizer_of(self._optimizer).param_groups if self._places else []
        for place in self._places:  # the groups are not kept: a resume puts new ones there
            group = groups[place]
            group[self._value_name] = _renewed(group[self._value_name], value)
        if self._target is not None:
            module, attribute = self._target
            setattr(module, attribute, _renewed(getattr(module, attribute), value))
        if self._log and isinstance(value, int | float):
            ctx.log(self._label, value, "last")

    def _value(self, progress: Progress) -> Any:
        try:
            return self._fn(progress.of_phase())
        except TypeError as error:
            if progress.total_steps is None:
                error.add_note("(progress.total_steps is None: pass max_steps to fit)")
            raise

    def _find_groups(self, groups: list[Group]) -> list[int]:
        chosen = self._group
        if chosen is None:
            places = list(range(len(groups)))
        elif callable(chosen):
            places = [place for place, group in enumerate(groups) if chosen(group)]
        else:
            places = [i for i, group in enumerate(groups) if chosen in (i, group.get("name"))]
        if not places:
            known = ", ".join(f"{i} {group.get('name', '')!r}" for i, group in enumerate(groups))
            raise ConfigError(f"{self.name}: no such parameter group; there are {known}")
        for place in places:
            if self._value_name not in groups[place] or self._value_name == "params":
                keys = [key for key in groups[place] if key not in ("params", "name")]
                raise ConfigError(
                    f"{self.name}: parameter group {place} has no {self._value_name!r}"
                    f"{_hint(self._value_name, keys)}"
                )
        return places

    def _find_module(self, model: nn.Module, target: str) -> tuple[nn.Module, str]:
        path, _, attribute = target.partition(":")
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            paths = [path for path, _ in model.named_modules() if path]
            raise ConfigError(f"{self.name}: no module {path!r}{_hint(path, paths)}") from error
        if callable(getattr(module, attribute, len)):  # not there, a method, or a submodule
            kinds = (int, float, str, tuple)
            have = [k for k, v in vars(module).items() if k[0] != "_" and isinstance(v, kinds)]
            raise ConfigError(
                f"{self.name}: {type(module).__name__} {path!r} has no {attribute!r}"
                f"{_hint(attribute, have)}"
            )
        return module, attribute


def _renewed(old: Any, value: Any) -> Any:
    """Returns what to set: a tensor stays the same tensor (others may hold it), with the value."""
    if not isinstance(old, Tensor):
        return value
    old.detach().fill_(value)
    return old


def _hint(wanted: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wanted, known, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{meant} there are {some_of(known, 20)}"
