"""Several optimizers: as one, for whoever does not ask which, and each by its name or place."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from itertools import islice
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dtrain.errors import ConfigError

#: By which one of several optimizers is known: its name, or its place in a list.
Key = int | str
Several = Sequence[Optimizer] | Mapping[str, Optimizer]
#: What a Trainer takes for its optimizer.
Optimizers = Optimizer | Several | Callable[[nn.Module], "Optimizer | Several"]

_ORDERS = ("grad_scale", "found_inf")  # what a fused optimizer is handed with a step, as attributes


class Together(Optimizer):
    """Several optimizers as one: their groups one after the other, stepped one after the other.

    What is noted of groups (rates, schedules, checkpoints) needs to know no more.
    """

    def __init__(self, parts: Mapping[Any, Optimizer], *, named: bool) -> None:
        # Not torch's: it would make groups of its own.
        self.parts: dict[Key, Optimizer] = dict(parts)
        self.named = named  # each is stepped in an update of its own, not all together

    # These are looked up anew: a part may be given another group, or another state, at any time.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """All groups, the parts' own dicts."""
        return [group for part in self.parts.values() for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """What is kept for each parameter; entries are the parts' own."""
        return {p: held for part in self.parts.values() for p, held in part.state.items()}

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """What all of them have: as what some lack cannot be scheduled for all."""
        first, *others = (part.defaults for part in self.parts.values())
        return {n: value for n, value in first.items() if all(n in other for other in others)}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        parts = self.parts.values()
        return all(bool(getattr(part, "_step_supports_amp_scaling", False)) for part in parts)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps each, and hands on what a fused one is told with a step."""
        orders = {name: vars(self)[name] for name in _ORDERS if name in vars(self)}
        for part in self.parts.values():
            vars(part).update(orders)
            try:
                part.step()
            finally:
                for name in orders:
                    del vars(part)[name]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Has each forget its gradients."""
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ConfigError: a group belongs to one of them."""
        raise ConfigError(
            f"add the group to one of the optimizers: ctx.optimizers[{next(iter(self.parts))!r}]"
            f".add_param_group(...); there are {', '.join(map(repr, self.parts))}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns a state as one optimizer's that has all groups; what is not of that form, apart.

        So parameters keep their state by name, whichever place their group has.
        """
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        more: list[dict[str, Any]] = []
        for part in self.parts.values():
            at = sum(len(group["params"]) for group in groups)
            own = dict(part.state_dict())
            held = own.pop("state")
            state |= {n + at: one for n, one in held.items() if isinstance(n, int)}
            if others := {n: one for n, one in held.items() if not isinstance(n, int)}:
                own["state"] = others
            groups += [
                group | {"params": [number + at for number in group["params"]]}
                for group in own.pop("param_groups")
            ]
            more.append(own)
        return {"state": state, "param_groups": groups} | ({"parts": more} if any(more) else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        groups = iter(state_dict["param_groups"])
        more = state_dict.get("parts") or [{}] * len(self.parts)
        for part, own in zip(self.parts.values(), more, strict=True):
            mine = [dict(group) for group in islice(groups, len(part.param_groups))]
            numbers = [number for group in mine for number in group["params"]]
            here = {number: place for place, number in enumerate(numbers)}
            for group in mine:
                group["params"] = [here[number] for number in group["params"]]
            state = {here[n]: held for n, held in state_dict["state"].items() if n in here}
            state |= own.get("state", {})
            part.load_state_dict({**own, "state": state, "param_groups": mine})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k!r}: {v!r}' for k, v in self.parts.items())})"


def as_one(given: Any) -> Any:
    """Returns several optimizers as one; what else is given, as it is: others look at that.

    Raises ConfigError where they are none, or not optimizers.
    """
    if not isinstance(given, list | tuple | Mapping):
        return given
    parts = dict(given) if isinstance(given, Mapping) else dict(enumerate(given))
    wrong = {key: part for key, part in parts.items() if not isinstance(part, Optimizer)}
    if wrong or not parts:
        kinds = ", ".join(type(part).__name__ for part in parts.values()) or "nothing"
        raise ConfigError(
            f"the optimizer is several ({kinds}), and each must be a torch.optim.Optimizer: "
            "[muon, adamw], or {'critic': ..., 'actor': ...}. A scheduler is a callback: "
            "dtrain.callbacks.LRSchedule"
        )
    if isinstance(given, Mapping):
        if bad := [name for name in parts if not (isinstance(name, str) and name.isidentifier())]:
            raise ConfigError(f"an optimizer is named {bad[0]!r}: a name is a plain word")
        return Together(parts, named=True)
    return Together(parts, named=False) if len(parts) > 1 else parts[0]


def parts_of(optimizer: Optimizer) -> dict[Key, Optimizer]:
    """Returns each optimizer by its name, or by its place; the only one is 0."""
    return optimizer.parts if isinstance(optimizer, Together) else {0: optimizer}


def WithClosure(optimizer: Optimizer) -> Optimizer:
    """Says that an optimizer's ``step`` takes a closure that it cannot do without; returns it.

    As SAM's; that of LBFGS shows in its signature. The closure runs the step's micro-batches again
    and returns the mean loss over all ranks.
    """
    vars(optimizer)["_dtrain_closure"] = True
    return optimizer


def needs_closure(optimizer: Optimizer) -> bool:
    """Says whether its ``step`` evaluates the loss again."""
    closure = signature(optimizer.step).parameters.get("closure")
    required = closure is not None and closure.default is closure.empty
    return required or bool(vars(optimizer).get("_dtrain_closure"))


def has_updates(optimizer: Optimizer) -> bool:
    """Says whether each of several optimizers is stepped in an update of its own."""
    return isinstance(optimizer, Together) and optimizer.named


def kind_of(optimizer: Optimizer) -> str:
    """Returns of what kind it is, or they are, in words."""
    if not isinstance(optimizer, Together):
        return type(optimizer).__name__
    kinds = {key: type(part).__name__ for key, part in optimizer.parts.items()}
    if optimizer.named:
        return ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
    return " + ".join(kinds.values())


def kinds_of_groups(optimizer: Optimizer) -> Iterator[str]:
    """Yields of which kind the optimizer of each group is; nothing where there is only one."""
    if isinstance(optimizer, Together):
        for part in optimizer.parts.values():
            yield from [type(part).__name__] * len(part.param_groups)
