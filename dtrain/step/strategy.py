"""The strategy seam: how gradients of different ranks meet, and what comes of a step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.callback import Callback
from dtrain.context import Loss, Progress, Step, Together
from dtrain.data import MicroBatches
from dtrain.distributed import (
    World,
    check_same_lines,
    digest_of,
    give_rank_0s,
    named_parameters,
    tensors_of_state,
)
from dtrain.errors import ConfigError, DtrainError, UnusedParameters
from dtrain.meta import check_made, make
from dtrain.step.device_lane import OnDevice
from dtrain.step.lane import Heard, LaneSilent, Verdict
from dtrain.step.micro_step import MicroStep
from dtrain.step.precision import Factor


class Strategy(ABC):
    """How gradients of different ranks meet. The loop knows only this.

    In a step it calls :meth:`run` for each micro-batch, then :meth:`heard`. What is not abstract
    here is for ranks that each have the whole model, and all gradients after the reduction.

    Ranks: all; local where a method does not say otherwise.
    """

    find_unused = False  # True where the reduction itself looks for parameters without gradient
    may_idle = True  # False where ranks wait for one another inside of the model
    #: True where no rank can run the model by itself; all then come to :meth:`evaluate`.
    meets_in_forward = False
    no_gathers = ""  # why loss functions cannot gather from other ranks, if so

    def check(  # noqa: B027 -- most have nothing to refuse
        self, *, accumulates: bool, callbacks: Sequence[Callback] = ()
    ) -> None:
        """Raises ConfigError for what cannot work, such as steps of several micro-batches."""

    def bring(self, model: nn.Module, world: World) -> nn.Module:
        """Returns the model on this rank's device, with what dtrain.meta_init left made."""
        check_made(model)
        make(model)
        return model.to(world.device)

    def prepare_model(self, model: nn.Module, world: World) -> nn.Module:
        """Returns the model, changed in place where the strategy needs it."""
        return model

    def samples_of(self, world: World) -> World:
        """Returns whose samples and random streams this rank has, of how many; local."""
        return world

    def describe(self) -> str:
        """Returns how gradients meet, in words, for the start block; or nothing."""
        return ""

    def make_equal(self, model: nn.Module, world: World) -> bool:
        """Gives all ranks rank 0's tensors; says if any differed here. Ranks: all, communicates."""
        return give_rank_0s(tensors_of_state(model), world)

    def take(self, micro_step: MicroStep, world: World) -> None:  # noqa: B027
        """Changes model and optimizer where that has to be before any of it is restored.

        Raises ConfigError for what of them cannot work. Ranks: all, communicates.
        """

    def wrap(self, micro_step: MicroStep, world: World) -> None:
        """Takes what is to be run in each micro-step. Ranks: all, communicates."""
        self._micro_step = micro_step
        self._world = world
        self._activity = world.comm.activity
        micro_step.take_trainable()

    def refresh(self) -> None:
        """Looks, where an epoch begins, what hooks or the script changed; raises as :meth:`adopt`.

        Ranks: all, communicates.
        """
        trained = self._micro_step.trained
        # A digest: every rank gets what all say, and this is said in every epoch.
        digest = int(digest_of(trained.lines()), 16) >> 1
        mine = torch.tensor([digest, int(trained.changed())])
        everyones = self._world.comm.all_gather("what is trained", mine)
        if bool((everyones != everyones[0]).any() or everyones[0, 1]):
            self.adopt()

    def check_alike(self) -> None:
        """Raises RankMismatch where ranks are to train other things. Ranks: all, communicates."""
        check_same_lines(
            "the ranks do not train the same parameters in the same way: freeze, thaw, add and set "
            "them alike on all",
            self._micro_step.trained.lines(),
            self._world.comm,
        )

    def adopt(self, *, in_step: bool = False, waited: bool = False) -> None:
        """Agrees on what is trained from now on, and wraps it, where a rank found it changed.

        In a step, after the reduction, gradients stay. Those of parameters that were new in it are
        reduced now, if all ``waited`` for it, and are dropped if not.

        Raises ConfigError if the optimizer does not have what is to be trained, RankMismatch if
        ranks are to train different things. Ranks: all, communicates.
        """
        step, world, comm = self._micro_step, self._world, self._world.comm
        error = None
        try:
            step.trained.check(begins=False)
        except ConfigError as found:
            error = found
        try:
            comm.raise_failures("what the optimizer has", error, comm.activity.phase.name)
        finally:
            del error  # its traceback has this frame
        self.check_alike()
        mine = torch.tensor([step.trained.changed(), step.trained.added()]).int()
        changed, added = comm.all_reduce("what changed", mine, "max").tolist()
        if not changed:
            return
        params = dict(named_parameters(step.model))
        if added and comm.vote("new ones differ", give_rank_0s(params, world)):
            step.context.say(
                "note: parameters that were added differed between ranks, which draw random "
                "numbers of their own; all have rank 0's now"
            )
        before, now = {*step.trainable}, step.trained.mine()
        if in_step and waited:
            self._reduce_new([p for p in now if p not in before])
        kept = [p.grad if in_step and (waited or p in before) else None for p in now]
        for p in (*before, *now, step.lane.param):
            p.grad = None  # views into the old buckets
        self.wrap(step, world)
        for p, grad in zip(now, kept, strict=True):
            p.grad = grad

    def _reduce_new(self, params: list[nn.Parameter]) -> None:
        """Reduces gradients of parameters that this step's reduction did not have."""
        for p in params if self._world.size > 1 else ():
            # A rank may have been idle.
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = (grad.to_dense() if grad.is_sparse else grad).mul_(self._share()).contiguous()
            self._world.gradients.all_reduce(p.grad)

    def _share(self) -> float:
        """What this rank's own gradients are to be multiplied by, for their sum to be the mean."""
        return 1 / self._world.size

    def withhold(self) -> None:
        """Keeps gradients from an update that not all ranks may have; local.

        For a step that is not waited for, in which this rank found other parameters to train.
        """
        if not self._micro_step.changed:
            return
        reduced = {*self._micro_step.trainable} - {*self._micro_step.trained.gone()}
        for p in (*self._micro_step.trainable, *self._micro_step.model.parameters()):
            if p not in reduced:
                p.grad = None

    def clear(self, optimizer: Optimizer) -> None:
        """Forgets the gradients of the step before, those that the optimizer does not have, too."""
        for p in self._micro_step.trainable:
            p.grad = None
        parts = optimizer.parts.values() if isinstance(optimizer, Together) else (optimizer,)
        for part in parts:
            for group in part.param_groups:  # some may have been unfrozen since
                for p in group["params"]:
                    p.grad = None
            if part.zero_grad != MethodType(Optimizer.zero_grad, part):
                part.zero_grad(set_to_none=True)  # it may do more

    @abstractmethod
    def run(self, step: Step, feed: MicroBatches, last: bool) -> None:
        """Runs forward and backward; reduces gradients in the last. Ranks: all, communicates."""

    @abstractmethod
    def heard(self) -> Heard:
        """Returns what all ranks said, after the last micro-batch; may raise UnusedParameters."""

    def gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """Returns tensors that hold all gradients of the optimizer, and otherwise zeros only.

        What is done to them in place is done to the gradients. They may be fewer than those.
        """
        groups = optimizer.param_groups
        return [g for group in groups for p in group["params"] if (g := p.grad) is not None]

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """Returns the joint Euclidean norm of the gradients, 0-dim; nobody waits for it."""
        return joint_norm(self.gradients(optimizer))

    def norm_of(self, gradients: list[Tensor]) -> Tensor:
        """Returns the joint norm over all ranks of what :meth:`gradients` returned, 0-dim."""
        return joint_norm(gradients)

    def norm_is_of(self, gradients: list[Tensor]) -> bool:
        """Says whether :meth:`gradient_norm` is that of these :meth:`gradients`, bit by bit."""
        return type(self).gradient_norm is Strategy.gradient_norm

    def meet(self, *, has: bool, ended: bool, first: bool) -> bool:
        """Tells all, where an evaluation takes turns, whether this rank ``has`` a batch.

        Returns whether all ranks' data have ended. Ranks: all, communicates.
        """
        return ended

    def look(self, fn: Callable[[], Loss], batch: Any) -> Loss:
        """Returns what ``fn`` returns, which runs the model once more, for a hook. All, local."""
        return fn()

    def bring_home(self, model: nn.Module, world: World) -> None:
        """Moves the model, which may have been away between two fits, to this rank's device."""
        model.to(world.device)

    def evaluate(self, fn: Callable[[], Any] | None, batch: Any = None) -> Any:
        """Returns what ``fn`` returns, of the ``batch``; None where this rank has none.

        Ranks: all, communicates.
        """
        return None if fn is None else fn()

    @abstractmethod
    def check_arrived(self) -> None:
        """Raises UnusedParameters for those without a gradient, where nobody waits for the lane."""

    def unused(self) -> DtrainError:
        """Returns the error for a step that turns out to have met no other rank's."""
        kind = type(self).__name__
        return UnusedParameters(
            f"no gradient reached {', '.join(self.missing()) or 'some parameters'}, so the ranks' "
            "gradients could not be summed and nothing was updated. Use the parameters in every "
            "loss, freeze them (`p.requires_grad_(False)`), or allow it: `from dtrain.strategies "
            f"import {kind}`, then `Trainer(strategy={kind}(find_unused_parameters=True))`."
        )

    def missing(self) -> list[str]:
        """Returns names of the parameters that have no gradient."""
        mine = {*map(id, self._micro_step.trained.mine())}
        named = named_parameters(self._micro_step.model)
        return [name for name, p in named if id(p) in mine and p.grad is None]


class Gate(NamedTuple):
    """What may be applied of a step: numbers, or tensors where nobody waits for the device."""

    factor: Factor  # what gradients must be multiplied by
    divisor: Factor  # or divided by
    closed: bool | Tensor  # whether parameters must stay the same
    undone: bool  # whether the step does not count at all; False where that is not known yet
    waits: bool  # all of it is known


class StepResult:
    """The result of a step, whose last micro-batch has just run. On CUDA, who asks may wait for it.

    Whoever asks first may get UnusedParameters, with those whose gradients never arrived.
    """

    def __init__(self, strategy: Strategy, progress: Progress, *, counts: bool = True) -> None:
        self._strategy = strategy
        self._progress = progress  # counts the update, once it is known whether it was applied
        self._counts = int(counts)  # of several in a step, one
        self._heard = strategy.heard()
        #: Whether the update was held back; None where that may still be on its way.
        self._blocked: bool | None = True

    def gate(self, *, waits: bool) -> Gate:
        """Returns what may be applied: numbers where it ``waits``, which on CUDA takes time."""
        if waits:
            verdict = self.verdict()
            if verdict.changed and not verdict.undone:
                self._strategy.adopt(in_step=True, waited=True)
            factor, closed = verdict.factor, not verdict.weight > 0
            return Gate(factor, 1 / factor if factor else 1.0, closed, verdict.undone, waits=True)
        self._strategy.check_arrived()
        self._strategy.withhold()
        heard = self._heard
        return Gate(heard.factor(), heard.divisor(), heard.veto(), undone=False, waits=False)

    def verdict(self) -> Verdict:
        """Returns what all ranks said."""
        try:
            return self._heard.verdict()
        except LaneSilent as silent:
            raise self._strategy.unused() from silent

    # What hooks see of it; see :class:`dtrain.context.Step`.

    @property
    def loss_mean(self) -> float:
        return self.verdict().loss_mean

    @property
    def weight(self) -> float:
        return self.verdict().weight

    @property
    def nonfinite(self) -> int:
        return self.verdict().nonfinite

    @property
    def applied(self) -> bool:
        self.arrive()
        return not self._blocked

    @property
    def loss(self) -> Tensor:
        return self._heard.loss()

    @property
    def held(self) -> float | None:
        return self._heard.held() if isinstance(self._heard, OnDevice) else None

    def settle(self, blocked: bool | Tensor, held: Tensor | None = None) -> None:
        """Says whether the update was held back, and counts it as soon as that is known.

        ``held``: whether callbacks did. Whoever asks whether a step was applied finds it counted in
        ``progress.updates``.
        """
        if isinstance(self._heard, OnDevice):
            self._heard.send(blocked, held)
        else:
            blocked = bool(blocked)  # the host has it at once
        self._blocked = blocked if isinstance(blocked, bool) else None
        if blocked is False:
            self._progress.updates += self._counts

    def arrive(self) -> None:
        """Waits until it is known whether the update was held back."""
        if self._blocked is None and isinstance(self._heard, OnDevice):
            self._blocked = self._heard.blocked()
            self._progress.updates += not self._blocked


def joint_norm(grads: list[Tensor]) -> Tensor:
    """Returns the Euclidean norm of all entries, in the bits of ``torch.nn.utils``."""
    # Of an embedding's, those that are not zero by construction: it may be sparse.
    entries = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    if len({(one.device, one.dtype) for one in entries}) != 1:
        return torch.nn.utils.get_total_norm(entries)
    one = entries[0] if len(entries) == 1 else torch.stack(torch._foreach_norm(entries))
    norm: Tensor = torch.linalg.vector_norm(one)
    return norm
