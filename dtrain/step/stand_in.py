"""Weights that stand in the model in place of its own: for an evaluation, or after a fit."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dtrain import accelerator
from dtrain.callback import Callback, weights_of
from dtrain.context import Context
from dtrain.distributed import (
    digests,
    named_parameters,
    named_state,
    own_part,
    placed_like,
    version_of,
)
from dtrain.errors import ConfigError


class StandIn:
    """Puts callbacks' weights into the model, and gives it its own back, bit for bit.

    Of a sharded model, a rank puts in its own rows, and ranks tell one another what was changed.
    """

    def __init__(self, context: Context, callbacks: tuple[Callback, ...]) -> None:
        self._context = context
        self._callbacks = callbacks
        self._own: dict[str, Tensor] = {}  # the model's, while others are in it
        self._put: Mapping[str, Tensor] = {}  # these others
        self._told = False  # that a hook wrote into these

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """A block in which the model holds what evaluations look at."""
        name, weights = weights_of(self._callbacks, "evaluated")
        self._put_in(name, weights)
        own = {n: t for n, t in self._tensors().items() if n in weights}
        # Buffers are shared anew by the evaluation itself.
        held = {n: t for n, t in own.items() if isinstance(t, nn.Parameter)}
        before = _digests(held.values())
        try:
            yield
            now = self._tensors()
            if gone := [n for n, t in held.items() if not _is_same(now.get(n), t)]:
                raise ConfigError(
                    f"a hook of an evaluation replaced {gone[0]} while the model held the weights "
                    f"of {name}: do that in on_epoch_end, or where a step or an epoch begins"
                )
            changed = self._anywhere(dict(zip(held, before, strict=True)), _digests(held.values()))
            if changed and not self._told:
                self._told = True
                self._context.say(
                    f"warning: a hook of an evaluation (or the model's forward) wrote {changed[0]} "
                    f"while the model held the weights of {name}, and its own have come back: "
                    "what is to stay must be written in on_epoch_end, or in a step"
                )
        finally:
            if not accelerator.is_lost(sys.exception()):
                own, self._own, self._put = self._own, {}, {}
                now = self._tensors()
                self._copy({n: t for n, t in own.items() if n in now and now[n].shape == t.shape})

    @contextmanager
    def stands_aside(self) -> Iterator[None]:
        """A block in which the model holds its own weights, as a checkpoint must."""
        now = self._tensors()
        standing = {name: now[name].detach().clone() for name in self._own}
        self._copy(self._own)
        try:
            yield
        finally:
            if not accelerator.is_lost(sys.exception()):
                self._copy(standing)

    @property
    def changes_at_end(self) -> bool:
        """Whether other weights count at the end of a fit than in a checkpoint on the way."""
        ends = weights_of(self._callbacks, "final")
        return ends[0] != weights_of(self._callbacks, "final", ended=False)[0]

    @contextmanager
    def stays(self) -> Iterator[None]:
        """A block at the end of ``fit``: what counts is in the model from there on."""
        name, weights = weights_of(self._callbacks, "final")
        self._put_in(name, weights)
        if name:
            self._context.say(f"the model holds the weights of {name}, not the last step's")
        versions = {n: version_of(t) for n, t in self._tensors().items()}
        yield
        now = {n: version_of(t) for n, t in self._tensors().items()}
        changed = [n for n, version in now.items() if version != versions.get(n)]
        if changed and self._context.run_dir is not None:
            self._context.say(
                f"warning: a callback's on_fit_end changed the model ({changed[0]}), and no "
                "checkpoint has that: weights that are to count must come from its weights(which)"
            )

    def leave(self) -> None:
        """Has what a fit has left in the model be its own, where another fit begins."""
        if self._own:
            self._context.say(
                "this fit goes on from the weights that the one before has left in the model, not "
                "from those of its last step"
            )
        self._own, self._put = {}, {}

    def take_out(self) -> None:
        """Gives the model its own weights back where the same fit goes on; or says why not."""
        own, put, self._own, self._put = self._own, self._put, {}, {}
        now = self._tensors()
        as_put = {n: n in now and _is_equal(now[n], t) for n, t in put.items()}
        if changed := self._anywhere(as_put, [True] * len(as_put)):
            self._context.say(
                "the model was changed since fit left averaged or best weights in it "
                f"({len(changed)} tensors, such as {changed[0]}): training goes on from these"
            )
        else:
            self._copy(own)

    def _put_in(self, name: str, weights: Mapping[str, Tensor]) -> None:
        own = self._tensors()
        wrong = [n for n, t in weights.items() if n not in own or own[n].shape != t.shape]
        if wrong:
            raise ConfigError(
                f"{name}.weights() has {wrong[0]!r}, and the model has no tensor of this name and "
                "shape; names are those of model.state_dict()"
            )
        self._own = {n: own[n].detach().clone() for n in weights}
        self._put = weights
        self._copy(weights)

    @torch.no_grad()
    def _copy(self, weights: Mapping[str, Tensor]) -> None:
        into = self._tensors() if weights else {}
        for name, values in weights.items():
            own_part(into[name]).copy_(own_part(placed_like(values, into[name])))

    def _anywhere(self, before: Mapping[str, Any], after: list[Any]) -> list[str]:
        """Returns the names of what differs: on any rank, where each holds some rows only."""
        differs = [a != b for a, b in zip(before.values(), after, strict=True)]
        if self._context.sharded and differs:
            mine = torch.tensor(differs).int()
            differs = self._context.comm.all_reduce("weights put in", mine, "max").tolist()
        return [name for name, one in zip(before, differs, strict=True) if one]

    def _tensors(self) -> dict[str, Tensor]:
        """The model's own, also those that a hook keeps out of its ``state_dict``."""
        model = self._context.model
        tensors = {n: t for n, t in named_state(model).items() if isinstance(t, Tensor)}
        return tensors | dict(named_parameters(model, remove_duplicate=False))


@torch.no_grad()
def _digests(tensors: Iterable[Tensor]) -> list[int]:
    held = [own_part(tensor) for tensor in tensors]
    return digests(held) if held else []


@torch.no_grad()
def _is_equal(now: Tensor, put: Tensor) -> bool:
    mine = own_part(now)
    return torch.equal(mine, own_part(placed_like(put, now)).to(mine))


@torch.no_grad()
def _is_same(now: Tensor | None, then: Tensor) -> bool:
    """Says whether it is in the same memory: a ``state_dict`` makes other objects of it."""
    if now is None or now.shape != then.shape:
        return False
    return own_part(now).data_ptr() == own_part(then).data_ptr()
