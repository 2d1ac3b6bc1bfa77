"""What a graph can hold of a loss function and its batches; what it cannot is refused in words."""

import copy
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dtrain.context import Context, Loss, Mean
from dtrain.data import parts_of
from dtrain.distributed import random_state_of_host
from dtrain.errors import ConfigError, LossError

#: What stays as it is in a fit, or does nothing that a replay would miss.
_STAYS = {"model", "device", "run_dir", "has_eval", "in_fit", "loss_scaled", "reads_at_once"}
_STAYS |= {"heartbeat", "long_operation"}
#: What modules keep on the host, and what they do hangs on.
NUMBERS = (bool, int, float, str)
OUT = "or leave out Trainer(graph=True)"


class Told(NamedTuple):
    """What the loss function returned."""

    loss: Loss
    weight: Any  # as it was given; None for the samples

    def weighs_on_device(self, device: str) -> bool:
        return isinstance(self.weight, Tensor) and self.weight.device.type == device


class Seen:
    """How often a form was seen, and the host's numbers, which must stay the same."""

    def __init__(self) -> None:
        self.count = 0
        self.dtype = torch.float32  # of the loss
        self._numbers: dict[str, str] = {}

    def take(self, told: Told, device: str) -> None:
        numbers = {}
        for name, value in told.loss.metrics.items():
            if hasattr(value, "compute"):
                raise LossError(
                    f"graph=True: the metric {name!r} is an object that adds up on the host, which "
                    "a graph does not: return numbers, or dtrain.Mean(total, weight); update the "
                    f"object in on_eval_batch; {OUT}"
                )
            parts = (value.total, value.weight) if isinstance(value, Mean) else (value,)
            numbers[f"the metric {name!r}"] = repr([p for p in parts if not is_on(p, device)])
        if told.weight is not None and not told.weighs_on_device(device):
            numbers["the loss's weight"] = repr(told.loss.weight)
        for name, number in numbers.items() if self.count else ():
            if (then := self._numbers.get(name)) != number:
                raise LossError(
                    f"graph=True: {name} is a number of the host that was {then} and is {number}; "
                    "a graph would keep it as it is. Make it a tensor on the device, such as "
                    f"mask.sum(), {OUT}"
                )
        self._numbers, self.dtype = numbers, told.loss.mean.dtype
        self.count += 1


class Still:
    """What the loss function is handed for a context: of that, what stays as it is."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._context, name)
        if name in _STAYS:
            return value
        raise ConfigError(
            f"graph=True: the loss function uses ctx.{name}, and a graph would keep what that was, "
            "or did, when it was captured. Do that in on_batch, where what changes can be put into "
            f"the batch as a tensor, or in on_loss, {OUT}"
        )


def numbers_of(model: nn.Module) -> dict[str, Any]:
    """Returns what modules keep on the host, by name, but for their modes."""
    return {
        name_of(name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) in NUMBERS and key != "training"
    }


def name_of(module: str, key: str) -> str:
    """Returns what to call what a module keeps."""
    return f"{module or 'the model'}.{key}"


def check_numbers(then: dict[str, Any], now: dict[str, Any], counted: set[str]) -> None:
    """Raises ConfigError where something has set one since, but for those that a call counts."""
    for name, value in now.items():
        old = then.get(name, value)
        if old is not value and old != value and name not in counted:
            raise ConfigError(
                f"graph=True: {name} was {old!r} in the step before and is {value!r}, and a "
                "graph would keep it. Make it a buffer, a tensor that is written in place (as "
                f"ParamSchedule does it), {OUT}"
            )


def is_on(value: Any, device: str) -> bool:
    """Says whether it is a tensor there."""
    return isinstance(value, Tensor) and value.device.type == device


def drawn_from(device: str) -> dict[str, Any]:
    """Returns the state of the host's generators, but for one that is the device's, too."""
    names = {"python": "random", "numpy": "numpy.random", "torch": "torch, on the CPU"}
    state = random_state_of_host()
    state["torch"] = state["torch"].numpy().tobytes()
    return {words: state[k] for k, words in names.items() if (k, device) != ("torch", "cpu")}


class _Same:
    """Something in a batch that is no tensor and no plain value: equal to itself only."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)


def form_of(value: Any, tensors: list[Tensor]) -> Any:
    """Returns what must be equal in batches that one graph serves; gathers the tensors."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested:
            kind = "nested" if value.is_nested else str(value.layout)
            raise ConfigError(f"graph=True: the batch holds a tensor that is {kind}; pad it, {OUT}")
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    if (parts := parts_of(value)) is not None:
        return type(value), *((name, form_of(part, tensors)) for name, part in parts.items())
    if value is None or type(value) in (bool, int, float, str, bytes):
        return type(value), value
    return _Same(value)


def rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Returns such a batch with other tensors."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, list | tuple):
        made = [rebuilt(part, tensors) for part in value]
        build: Callable[..., Any] = type(value)
        return build(*made) if hasattr(value, "_fields") else build(made)
    if (parts := parts_of(value)) is None:
        return value
    batch = copy.copy(value)
    for name, part in parts.items():
        if isinstance(batch, MutableMapping):
            batch[name] = rebuilt(part, tensors)
        else:
            object.__setattr__(batch, name, rebuilt(part, tensors))  # it may be frozen
    return batch


def shapes_of(tensors: list[Tensor]) -> str:
    """Returns what a batch is made of, in words."""
    each = (f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}" for one in tensors)
    return ", ".join(each) or "no tensors"
