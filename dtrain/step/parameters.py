"""What is trained: the model's parameters, and whether the optimizer still has them."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.context import Context, Key, Together, needs_closure, parts_of
from dtrain.distributed import named_parameters, some_of
from dtrain.errors import ConfigError

_SHOWN = 5  # names in a message
_FLAG, _PARAMS = attrgetter("requires_grad"), itemgetter("params")


class Parameters:
    """The parameters that are reduced, and a quick look whether they are still those to train.

    A hook may freeze, thaw, replace or add some at any moment; ranks agree on that in
    :meth:`dtrain.step.Strategy.adopt`, once a look has found it.
    """

    def __init__(self, context: Context, optimizer: Key | None = None) -> None:
        self._context, self._model = context, context.model
        self._key = optimizer  # of several, whose parameters alone are reduced
        # What was told of when the Trainer was made. By name: it may be replaced.
        self._lacking = {*lacking(context.optimizer, context.model)}
        self._optimizer: Optimizer | None = None
        self.trainable: list[nn.Parameter] = []
        #: How many updates there were before the newest parameters came, which have no state yet.
        self.since = 0
        self.params: list[nn.Parameter] = []  # the model's
        self._nodes: list[object] = []
        # The dicts in which modules keep their parameters and one another: those that are empty, so
        # that there is little to look through, and what is in the others, which is live.
        self._empty: list[Collection[Any]] = []
        self._filled: list[Iterable[Any]] = []
        self._parts: list[Any] = []  # all that must stay the same objects
        self._forms: dict[nn.Parameter, tuple[Any, ...]] = {}  # in which they were first taken

    def take(self) -> None:
        """Takes what is to be trained from now on; raises ConfigError if nothing is."""
        context, model = self._context, self._model
        trainable = self.mine()
        if not trainable and self._key is None:  # of several, an update may be left out
            raise ConfigError("every parameter of the model is frozen: nothing to train")
        self.since = context.progress.updates if self.trainable else 0
        context._taken += 1
        self.trainable, self._optimizer = trainable, context.optimizer
        self._held = _held(context.optimizer)
        # Of a subclass the memory may be hidden, or in several places.
        plain = [p for p in trainable if type(p) is nn.Parameter]
        self._forms = {p: self._forms.get(p) or _form(p) for p in plain}
        self._nodes = []
        self._places = [*map(Tensor.data_ptr, self._forms)]
        self.params = [*model.parameters()]
        self._flags = [*map(_FLAG, self.params)]
        self._take_parts()

    def mine(self) -> list[nn.Parameter]:
        """Returns those of the model that are to be trained now, and reduced."""
        params = [p for p in self._context.model.parameters() if p.requires_grad]
        if self._key is None:
            return params
        held = {*map(id, _held(self._context.optimizers[self._key]))}
        return [p for p in params if id(p) in held]

    def changed(self) -> bool:
        """Says whether others are to be trained than were taken; that costs some microseconds.

        Raises ConfigError where the tensors in them have another form.
        """
        # Done in each step, so no loop is Python's: a small model takes a step in 300 microseconds.
        model, optimizer = self._context.model, self._context.optimizer
        held = chain.from_iterable(map(_PARAMS, optimizer.param_groups))
        # The last one is nowhere else, so that a list differs from what is only its beginning.
        parts = [model, *chain.from_iterable(self._filled), *held, optimizer]
        self._parts = self._parts or parts
        if any(self._empty) or not all(map(is_, parts, self._parts)):
            # Other parameters; or modules only, as where a forward sets some.
            if not self._are_all():
                return True
            self._take_parts()
        if [*map(_FLAG, self.params)] != self._flags:
            return True
        if [*map(Tensor.data_ptr, self._forms)] != self._places:  # `p.data = ...`, or a cast
            self._check_forms()
            if not all(map(is_, map(_node, self._forms), self._nodes)):
                return True
            self._places = [*map(Tensor.data_ptr, self._forms)]
        return False

    def _take_parts(self) -> None:
        dicts = [d for m in self._model.modules() for d in (m._parameters, m._modules)]
        self._empty = [d for d in dicts if not d]
        # A ScriptModule has something else than dicts.
        self._filled = [d.values() if isinstance(d, dict) else _Values(d) for d in dicts if d]
        self._parts = []
        self.changed()  # takes the parts that there are

    def _are_all(self) -> bool:
        model, optimizer = self._context.model, self._context.optimizer
        now = [model, *model.parameters(), *_held(optimizer), optimizer]
        then = [self._model, *self.params, *self._held, self._parts[-1]]
        return len(now) == len(then) and all(map(is_, now, then))

    def watch_nodes(self) -> None:
        """Has a parameter count as changed that autograd has another node of, as after a cast."""
        self._nodes = [*map(_node, self._forms)]

    def added(self) -> bool:
        """Says whether the model has parameters that it did not have when they were taken."""
        return not {*self._model.parameters()} <= {*self.params}

    def gone(self) -> list[nn.Parameter]:
        """Returns those of ``trainable`` that are not to be trained any more."""
        now = {id(p) for p in self._model.parameters() if p.requires_grad}
        return [p for p in self.trainable if id(p) not in now]

    def check(self, *, begins: bool) -> None:
        """Raises ConfigError where the optimizer cannot train what is to be trained.

        Another optimizer is taken where a fit ``begins``.
        """
        context, optimizer = self._context, self._context.optimizer
        if context.model is not self._model:
            raise ConfigError("ctx.model was set to another model: change parts of it instead")
        if not (begins or optimizer is self._optimizer):
            raise ConfigError(
                "another optimizer was set in the middle of fit, which schedules would not know: "
                "set trainer.optimizer between two fits"
            )
        self._check_forms()
        if begins and self._optimizer is not None and optimizer is not self._optimizer:
            self._lacking = {*(left := lacking(optimizer, self._model))}
            note = note_of(left) or "note: trained by another optimizer from now on"
            if self._key in (None, next(iter(context.optimizers))):
                context.say(note)
            self._optimizer = optimizer
        left = [n for n in lacking(optimizer, self._model) if n not in self._lacking]
        if left:
            raise ConfigError(
                f"the optimizer does not have {some_of(left, _SHOWN)}, which were added or thawed "
                "since the Trainer was made: they would never move. Put them into it, too "
                "(`ctx.optimizer.add_param_group({'params': [...]})`), or freeze them by "
                "requires_grad_(False)"
            )
        # Of parameters that were replaced: it could not be saved.
        held = {id(p) for p in _held(optimizer)}
        for one in context.optimizers.values():
            for p in [p for p in one.state if isinstance(p, Tensor) and id(p) not in held]:
                del one.state[p]

    def lines(self) -> list[str]:
        """Returns what must be equal on all ranks: what is trained, and how."""
        named: dict[int, str] = {}
        lines: list[str] = []
        known = {*self.params} or {*self._model.parameters()}
        for name, p in named_parameters(self._model):
            named[id(p)] = name
            what = " frozen" * (not p.requires_grad) + " new" * (p not in known)
            lines.append(f"{name} {list(p.shape)} {p.dtype}{what}")
        for number, group in enumerate(self._context.optimizer.param_groups):
            values = {k: _number(v) for k, v in group.items() if k != "params"}
            lines += [f"{k}={v} in group {number}" for k, v in values.items() if v is not None]
            names = ", ".join(named.get(id(p), "none of the model's") for p in group["params"])
            lines.append(f"group {number} of {names}")
        return lines

    def _check_forms(self) -> None:
        changed = [p for p, form in self._forms.items() if _form(p) != form]
        if not changed:
            return
        names = {p: name for name, p in named_parameters(self._model)}
        words = [
            f"{names.get(p, 'one that was replaced')} was {' '.join(map(str, self._forms[p]))}, "
            f"and is {' '.join(map(str, _form(p)))}"
            for p in changed
        ]
        raise ConfigError(
            f"the form of parameters changed since training began: {some_of(words, 2)} (dtype, "
            "device, shape, strides). The optimizer's state is of the old form: give them the new "
            "one before the Trainer is made, or change them back"
        )


def lacking(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Returns names of parameters that require a gradient and that the optimizer does not have.

    Raises ConfigError where it is none, or of another model.
    """
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"the optimizer is {optimizer!r}, no torch.optim.Optimizer")
    closed = [one for one in parts_of(optimizer).values() if needs_closure(one)]
    if closed and isinstance(optimizer, Together):
        raise ConfigError(
            f"{type(closed[0]).__name__} cannot be one of several optimizers: its step evaluates "
            "the loss several times, by a closure. Use it alone, or another one"
        )
    held = _held(optimizer)
    ids, ours = {id(p) for p in held}, {id(p) for p in model.parameters()}
    if len(ids) < len(held) and isinstance(optimizer, Together):
        counts = Counter(map(id, held))
        twice = [name for name, p in named_parameters(model) if counts[id(p)] > 1]
        raise ConfigError(
            f"{some_of(twice, _SHOWN)} in several of the optimizers "
            f"({', '.join(map(repr, optimizer.parts))}): each parameter is stepped by one"
        )
    left = [n for n, p in named_parameters(model) if p.requires_grad and id(p) not in ids]
    if strange := [p for p in held if id(p) not in ours]:
        shapes = ", ".join(str(list(p.shape)) for p in strange[:5])
        lacks = f"; it lacks {some_of(left, _SHOWN)}" if left else ""
        raise ConfigError(
            f"{len(strange)} of the optimizer's {len(held)} parameters are not the model's (shapes "
            f"{shapes}{lacks}). Make the optimizer from this model, after its last change; or pass "
            "a function: Trainer(model, lambda m: AdamW(m.parameters()), ...)"
        )
    return left


def note_of(left: list[str]) -> str:
    """Returns what to tell the user of parameters that the optimizer lacks, if there are any."""
    words = f"note: the optimizer does not have {some_of(left, _SHOWN)}, which require a gradient"
    return words if left else ""


class _Values:
    """What is in a mapping whose ``values()`` are not live."""

    def __init__(self, mapping: Any) -> None:
        self._mapping = mapping

    def __iter__(self) -> Iterator[Any]:
        return iter(self._mapping.values())


def _held(optimizer: Optimizer) -> list[nn.Parameter]:
    return [*chain.from_iterable(map(_PARAMS, optimizer.param_groups))]


def _number(value: object) -> object:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value if isinstance(value, int | float | str | tuple) else None


def _node(p: nn.Parameter) -> object:
    """Autograd's node of a parameter, which has DDP's hooks; a cast puts another in its place."""
    with torch.enable_grad():
        made = p.view_as(p).grad_fn
    assert made is not None
    return made.next_functions[0][0]


def _form(p: nn.Parameter) -> tuple[Any, ...]:
    return p.dtype, p.device, list(p.shape), p.stride()
