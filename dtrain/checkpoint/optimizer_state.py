"""An optimizer's state in a checkpoint: matched by parameters' names, and told where it differs.

Its groups are noted as the script made them, before any schedule: ``{"params": [names],
"values": {"lr": 0.1, ...}}``, one a group; of several optimizers with their ``"kind"``.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.checkpoint.stored import Stored
from dtrain.context import kinds_of_groups
from dtrain.distributed import fill_own_part, is_sharded, named_parameters, some_of
from dtrain.errors import ConfigError, ResumeError

Group = dict[str, Any]
_NO_VALUES = ("params", "param_names", "initial_lr")
_NAMED = 4
_PLAIN = (bool, int, float, str, tuple, type(None))
#: Values for which torch's optimizers keep a state that they make with a parameter's first step.
_OF_FIRST_STEP = ("amsgrad", "centered")


def groups_of(optimizer: Optimizer, model: nn.Module) -> list[Group]:
    """Returns of each group the names of its parameters, and its plain values."""
    named = {id(p): name for name, p in named_parameters(model)}
    kinds = [*kinds_of_groups(optimizer)]
    return [
        {
            # What is not the model's goes by its place.
            "params": [named.get(id(p), f"? {i}.{j}") for j, p in enumerate(group["params"])],
            "values": _values(group),
        }
        | ({"kind": kinds[i]} if kinds else {})
        for i, group in enumerate(optimizer.param_groups)
    ]


def _values(group: Group) -> dict[str, Any]:
    first = group | {"lr": group.get("initial_lr", group.get("lr"))}  # before a schedule
    plain = {
        name: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        for name, value in first.items()
        if name not in _NO_VALUES
    }
    return {name: value for name, value in plain.items() if isinstance(value, _PLAIN)}


def check_override(override: Mapping[str, Any], groups: list[Group]) -> None:
    """Raises ConfigError where a value is of no group, of another kind, or not one for each."""
    if not isinstance(override, Mapping):
        raise ConfigError(f"fit(override={override!r}): a dict, such as {{'lr': 1e-4}}")
    for name, value in override.items():
        known = {key for group in groups for key in group["values"]} - {"name"}
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"fit(override={{{name!r}: ...}}): the optimizer has no such value{hint}. There "
                f"are {', '.join(sorted(known))}"
            )
        if isinstance(value, list) and len(value) != len(groups):
            raise ConfigError(
                f"fit(override={{{name!r}: {value!r}}}): a list has one value for each parameter "
                f"group, and there are {len(groups)}"
            )
        for place, group in enumerate(groups):
            mine, held = (value[place] if isinstance(value, list) else value), group["values"]
            if name in held and not _is_kind_of(mine, held[name]):
                raise ConfigError(
                    f"fit(override={{{name!r}: {mine!r}}}): cannot take the place of {held[name]!r}"
                )


def _is_kind_of(value: Any, old: Any) -> bool:
    """Says whether a value may take an old one's place, of which None may be any plain one."""
    if isinstance(old, tuple):
        same = isinstance(value, tuple) and len(value) == len(old)
        return same and all(map(_is_kind_of, value, old))
    if isinstance(old, int | float) and not isinstance(old, bool):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, _PLAIN) and (old is None or value is None or type(value) is type(old))


def put_override(
    override: Mapping[str, Any], groups: list[Group], noted: list[Group], *, begun: bool
) -> None:
    """Sets values in ``groups``, an optimizer's or saved ones, where others are in force.

    A group that is given a new rate has no ``initial_lr`` any more: so a schedule finds out. Once
    the optimizer has ``begun``, ConfigError is raised where a value needs another state.
    """
    for name, value in override.items():
        for place, (group, note) in enumerate(zip(groups, noted, strict=True)):
            mine = value[place] if isinstance(value, list) else value
            if note["values"].get(name) == mine or name not in group:
                continue
            old = group[name]
            lazy = name in _OF_FIRST_STEP or (name == "momentum" and "alpha" in group)  # RMSprop
            if begun and lazy and mine and not old:
                raise ConfigError(
                    f"fit(override={{{name!r}: {mine!r}}}): for that the optimizer keeps a state "
                    "from its first step on, which the run has not: leave it, or begin another run"
                )
            group[name] = old.fill_(mine) if isinstance(old, Tensor) else mine
            note["values"][name] = mine
            if name == "lr":
                group.pop("initial_lr", None)


def arrange(
    state: dict[str, Any], there: list[Group] | None, here: list[Group], run: str
) -> tuple[dict[str, Any], list[Group]]:
    """Returns an optimizer's saved state, and its groups, in the order of the groups ``here``.

    A ResumeError tells where parameters are grouped otherwise. Where no names were saved (until
    0.1), places count.
    """
    saved = state["param_groups"]
    if there is None:
        counts = [len(group["params"]) for group in saved]
        if counts != [len(group["params"]) for group in here]:
            raise _regrouped([{"params": ["?"] * count} for count in counts], here, run)
        pairs = zip(here, saved, strict=True)
        there = [{"params": note["params"], "values": _values(group)} for note, group in pairs]
    places: list[int] = []
    for group in here:
        same = [i for i, other in enumerate(there) if _is_same(other, group)]
        places += [place for place in same if place not in places][:1]
    if not len(places) == len(here) == len(there):
        raise _regrouped(there, here, run)
    numbers = {
        (place, name): number
        for place, (note, group) in enumerate(zip(there, saved, strict=True))
        for name, number in zip(note["params"], group["params"], strict=True)
    }
    order = [numbers[place, n] for place, g in zip(places, here, strict=True) for n in g["params"]]
    there = [
        group | {"values": there[place]["values"]}
        for place, group in zip(places, here, strict=True)
    ]
    if order == [number for group in saved for number in group["params"]]:
        return {**state, "param_groups": [dict(group) for group in saved]}, there
    new = {old: number for number, old in enumerate(order)}
    groups = [
        {k: v for k, v in saved[place].items() if k != "param_names"}
        | {"params": [new[numbers[place, name]] for name in group["params"]]}
        for place, group in zip(places, here, strict=True)
    ]
    moved = {new.get(key, key): value for key, value in state["state"].items()}
    return {**state, "state": moved, "param_groups": groups}, there


def place(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Reads a saved state, of which is in files; of sharded parameters, this rank's part only."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in zip(numbers, parameters, strict=True):
        if number in saved["state"]:
            state = saved["state"][number].items()
            saved["state"][number] = {
                name: _placed(value, p) if isinstance(value, Stored) else value
                for name, value in state
            }
    for number in saved["state"].keys() - {*numbers}:  # of no parameter
        for name, value in saved["state"][number].items():
            if isinstance(value, Stored):
                saved["state"][number][name] = value.whole()


def _placed(stored: Stored, p: Tensor) -> Tensor:
    if not is_sharded(p) or stored.shape != p.shape:
        return stored.whole()
    mine = torch.zeros_like(p, dtype=stored.dtype)
    fill_own_part(mine, stored.part)
    return mine


def _is_same(there: Group, here: Group) -> bool:
    same = sorted(there["params"]) == sorted(here["params"])
    return same and there.get("kind") == here.get("kind")


def _regrouped(there: list[Group], here: list[Group], run: str) -> ResumeError:
    differing = "\n".join(
        f"  {where}, group {place}{_kind(group)}: {_parameters(group['params'])}"
        for where, groups, others in (("there", there, here), ("here", here, there))
        for place, group in enumerate(groups)
        if not any(_is_same(other, group) for other in others)
    )
    return ResumeError(
        f"the run in {run} cannot go on with this optimizer: it has {_groups(there)} there, "
        f"{_groups(here)} here, and they hold other parameters:\n{differing}\n"
        "Make groups of the same parameters (their order does not count; what was added later, add "
        "before fit), choose another run_dir, or pass resume='never' to begin anew here."
    )


def _kind(group: Group) -> str:
    return f" ({group['kind']})" if "kind" in group else ""


def _groups(groups: list[Group]) -> str:
    count = sum(len(group["params"]) for group in groups)
    return f"{len(groups)} parameter group{'s' * (len(groups) != 1)} of {count} parameters"


def _parameters(names: list[str]) -> str:
    return f"{len(names)} parameters ({some_of(names, _NAMED)})"


def differences(
    there: list[Group], here: list[Group], override: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Returns values that are in force though the script made others; and what to tell of them."""
    in_force: dict[str, Any] = {}
    lines: list[str] = []
    names = dict.fromkeys(name for group in here for name in group["values"] if name != "name")
    for name in names:
        old, new = ([g["values"].get(name) for g in groups] for groups in (there, here))
        if name in override:
            in_force[name] = override[name]
            taken = override[name] if isinstance(override[name], list) else [override[name]]
            if _one(old) != _one(taken):
                lines.append(f"{name} {_one(taken)} is taken, not {_one(old)} (override)")
        elif any(name in g["values"] and a != b for g, a, b in zip(there, old, new, strict=True)):
            in_force[name] = _one(old)
            lines.append(
                f"{name} {_one(old)} there, {_one(new)} here: {_one(old)} is kept; "
                f"fit(override={{{name!r}: {_one(new)!r}}}) takes the new one"
            )
    return in_force, lines


def _one(values: list[Any]) -> Any:
    """Returns the one value that all groups have; or a list of each group's."""
    return values[0] if all(value == values[0] for value in values) else values
