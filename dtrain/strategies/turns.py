"""Evaluations of a sharded model: ranks meet in each forward, whoever has a batch."""

from collections.abc import Callable
from typing import Any

import torch

from dtrain.context import Loss
from dtrain.distributed import World
from dtrain.errors import ConfigError
from dtrain.step import MicroStep
from dtrain.strategies.sharding import Sharding
from dtrain.strategies.tape import Node


class Turns:
    """The turns of an evaluation, or of predictions; in each, a rank has a batch, or none.

    Ranks: all, communicates.
    """

    def __init__(self, sharding: Sharding, micro_step: MicroStep, world: World) -> None:
        self._sharding, self._micro_step, self._world = sharding, micro_step, world
        self._plan: Node | None = None  # in which order modules run; known to all ranks, or to none
        self._have = 0  # how many ranks have a batch in this turn

    def meet(self, *, has: bool, ended: bool, first: bool) -> bool:
        """Begins a turn; returns whether all ranks' data have ended."""
        if self._sharding.tape.is_open:
            raise ConfigError(
                "evaluate, predict and ctx.loss_of cannot be called in a loss function, on_batch "
                "or on_loss with strategy='fsdp': the model is in a forward. Do it in on_step_end"
            )
        if first:
            self._plan = None  # it may be another function
        mine = torch.tensor([has, ended]).int()
        self._have, done = self._world.comm.all_reduce("who has a batch", mine).tolist()
        return bool(done == self._world.size)

    def look(self, fn: Callable[[], Loss], batch: Any) -> Loss:
        """Returns what ``fn`` returns, in a turn by itself; a loss of weight 0 without a batch."""
        self.meet(has=batch is not None, ended=False, first=True)
        with torch.no_grad():
            found: Loss | None = self.evaluate(None if batch is None else fn, batch)
        return found or Loss(torch.zeros((), device=self._world.device), weight=0)

    def evaluate(self, fn: Callable[[], Any] | None, batch: Any) -> Any:
        """Returns what ``fn`` returns. What it raises is raised once the others are done."""
        if not self._have:
            return None
        sharding = self._sharding
        # A rank without a batch follows, and so does one that fails; or it knows the order.
        tells = self._plan is None or self._have < self._world.size
        returned: list[Any] = []
        raised: list[Exception] = []
        if sharding.twins is not None:
            apart = sharding.twins.compare(fn is not None, "have a batch", batch)
            if apart is not None:
                raised.append(apart)
                fn = None

        def kept() -> None:
            try:
                if fn is not None:
                    returned.append(fn())
            except Exception as error:  # noqa: BLE001 -- raised below
                raised.append(error)

        try:
            _, plan = sharding.run(kept, tells=tells)
            if sharding.recorder.wrote is not None and not raised:
                returned.clear()
                raised.append(sharding.recorder.wrote)
            plan = plan if returned else None
            if tells:
                if plan is None:
                    sharding.reset()
                self._plan = sharding.following.follow(plan, self._micro_step) or self._plan
            elif plan is not None:
                self._plan = plan
            elif self._plan is not None:
                sharding.play(self._plan)
        finally:
            sharding.reset()  # without a backward, some would stay unsharded
            sharding.tape.close()
        if raised:
            try:
                raise raised[0]
            finally:
                raised.clear()  # its traceback has this frame
        return returned[0] if returned else None
