"""The strategy seam: how gradients of different ranks meet."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.context import Step
from dtrain.data import MicroBatches
from dtrain.distributed import World
from dtrain.errors import UnusedParameters
from dtrain.step.lane import Heard
from dtrain.step.micro_step import MicroStep


class Strategy(ABC):
    """How gradients of different ranks meet. The loop knows only this.

    In a step the loop calls :meth:`run` for each micro-batch, then :meth:`heard`.

    Ranks: all; local where a method does not say otherwise.
    """

    #: True where the reduction itself looks for parameters that no gradient reached.
    find_unused = False
    #: False where ranks wait for one another inside of the model, so that none may stay away.
    may_idle = True

    def check(self, *, accumulates: bool) -> None:  # noqa: B027 -- most have nothing to refuse
        """Raises ConfigError for what cannot work, such as steps of several micro-batches."""

    def prepare_model(self, model: nn.Module, world: World) -> nn.Module:
        """Returns the model, changed in place where the strategy needs it."""
        return model

    def describe(self) -> str:
        """Returns how gradients meet, in words, for the start block; or nothing."""
        return ""

    @abstractmethod
    def make_equal(self, model: nn.Module, world: World) -> bool:
        """Gives all ranks rank 0's parameters and buffers; returns whether any differed here.

        Ranks: all, communicates.
        """

    @abstractmethod
    def wrap(self, micro_step: MicroStep, world: World) -> None:
        """Takes what is to be run in each micro-step.

        Ranks: all, communicates.
        """

    @abstractmethod
    def refresh(self) -> None:
        """Takes notice of parameters that were frozen or unfrozen.

        Raises:
            ConfigError: every parameter is frozen.
            RankMismatch: ranks froze different ones.

        Ranks: all, communicates.
        """

    def clear(self, optimizer: Optimizer) -> None:
        """Forgets the gradients of the step before."""
        optimizer.zero_grad(set_to_none=True)

    @abstractmethod
    def run(self, step: Step, feed: MicroBatches, last: bool) -> None:
        """Runs forward and backward; gradients are reduced in the last micro-batch.

        Ranks: all; communicates where ``last``.
        """

    @abstractmethod
    def heard(self) -> Heard:
        """Returns what all ranks said in the step, after its last micro-batch.

        Raises:
            UnusedParameters: names parameters whose gradients never arrived.
        """

    @abstractmethod
    def gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """Returns tensors that hold all gradients of the optimizer, and otherwise zeros only.

        What is done to them in place is done to the gradients. They may be fewer than those.
        """

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """Returns the joint Euclidean norm of the gradients, 0-dim; nobody waits for it."""
        return joint_norm(self.gradients(optimizer))

    @abstractmethod
    def check_arrived(self) -> None:
        """Raises UnusedParameters for those without a gradient, where nobody waits for the lane."""

    @abstractmethod
    def unused(self) -> UnusedParameters:
        """Returns the error for a step that turns out to have met no other rank's."""


def joint_norm(grads: list[Tensor]) -> Tensor:
    """Returns the Euclidean norm of all entries, in the bits of ``torch.nn.utils``."""
    # Of an embedding's, those that are not zero by construction: it may be sparse.
    entries = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    if len({(one.device, one.dtype) for one in entries}) != 1:
        return torch.nn.utils.get_total_norm(entries)
    one = entries[0] if len(entries) == 1 else torch.stack(torch._foreach_norm(entries))
    norm: Tensor = torch.linalg.vector_norm(one)
    return norm
