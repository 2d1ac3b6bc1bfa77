"""What training changes in a model and its optimizers, kept in order to be put back."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.context import parts_of

_PLAIN = (bool, int, float, str, type(None), Tensor)


class Snapshot:
    """Keeps, and puts back, bit for bit; tensors stay the objects that they are.

    Of modules: parameters, buffers, numbers and tensors that are attributes, whether a gradient is
    required. Of optimizers, and of those that they hold: state, groups, attributes of these kinds.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        # On the host: on a device, it would take the room that is to be measured.
        self._tensors = [(t, t.detach().to("cpu", copy=True)) for t in tensors.values()]
        self._held: list[tuple[Tensor, Tensor]] = []  # of which some cannot be written to
        self._gradients = [(p, p.requires_grad) for p in model.parameters()]
        self._puts: list[Callable[[], None]] = []
        for module in model.modules():
            self._keep(vars(module))
            self._puts.append(_putting(module._buffers))
        memo: dict[int, Any] = {id(p): p for p in model.parameters()}
        for one in _all_optimizers(optimizer):
            self._keep(vars(one))
            self._optimizer(one, memo)

    def _keep(self, attributes: dict[str, Any]) -> None:
        plain = {name: value for name, value in attributes.items() if isinstance(value, _PLAIN)}
        self._held += [
            (t, t.detach().to("cpu", copy=True)) for t in plain.values() if isinstance(t, Tensor)
        ]
        self._puts.append(lambda: attributes.update(plain))

    def _optimizer(self, optimizer: Optimizer, memo: dict[int, Any]) -> None:
        state = {p: copy.deepcopy(held, memo) for p, held in optimizer.state.items()}
        groups = [
            {n: [*v] if n == "params" else copy.deepcopy(v, memo) for n, v in group.items()}
            for group in optimizer.param_groups
        ]

        def put() -> None:
            optimizer.state.clear()
            optimizer.state.update(state)
            del optimizer.param_groups[len(groups) :]
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                for key in group.keys() - values.keys():
                    del group[key]
                for key, value in values.items():
                    set_value(group, key, value)

        self._puts.append(put)

    def put_back(self) -> None:
        """Makes all of it what it was; gradients are gone."""
        for put in self._puts:
            put()
        with torch.no_grad():
            changed = [(t, was) for t, was in self._held if not torch.equal(t.cpu(), was)]
            for tensor, before in (*self._tensors, *changed):
                tensor.copy_(before)
        for parameter, required in self._gradients:
            parameter.requires_grad_(required).grad = None


def _putting(buffers: dict[str, Tensor | None]) -> Callable[[], None]:
    before = dict(buffers)  # a forward may put another one in the place of one of them
    return lambda: buffers.update(before)


def _all_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yields it, or each of several, and those that wrap others, as SAM does, with these."""
    ahead, seen = [*parts_of(optimizer).values()], set[int]()
    while ahead:
        one = ahead.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            ahead += [held for held in vars(one).values() if isinstance(held, Optimizer)]


def set_value(group: dict[str, object], key: str, value: object) -> None:
    """Sets a value of the optimizer; one that is a tensor stays the one that it is."""
    now = group.get(key)
    if isinstance(now, Tensor):
        now.copy_(value) if isinstance(value, Tensor) else now.fill_(value)  # type: ignore[call-overload]
    else:
        group[key] = value
