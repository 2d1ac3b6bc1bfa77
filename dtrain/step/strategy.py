"""The strategy seam: how gradients of different ranks meet."""

from abc import ABC, abstractmethod
from types import MethodType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.context import Step
from dtrain.data import MicroBatches
from dtrain.distributed import World, digest_of
from dtrain.errors import RankMismatch, UnusedParameters
from dtrain.step.lane import Heard
from dtrain.step.micro_step import MicroStep


class Strategy(ABC):
    """How gradients of different ranks meet. The loop knows only this.

    In a step it calls :meth:`run` for each micro-batch, then :meth:`heard`. What is not abstract
    here is for ranks that each have the whole model, and all gradients after the reduction.

    Ranks: all; local where a method does not say otherwise.
    """

    find_unused = False  # True where the reduction itself looks for parameters without gradient
    may_idle = True  # False where ranks wait for one another inside of the model

    def check(self, *, accumulates: bool) -> None:  # noqa: B027 -- most have nothing to refuse
        """Raises ConfigError for what cannot work, such as steps of several micro-batches."""

    def prepare_model(self, model: nn.Module, world: World) -> nn.Module:
        """Returns the model, changed in place where the strategy needs it."""
        return model

    def describe(self) -> str:
        """Returns how gradients meet, in words, for the start block; or nothing."""
        return ""

    def make_equal(self, model: nn.Module, world: World) -> bool:
        """Gives all ranks rank 0's parameters and buffers; returns whether any differed here.

        Ranks: all, communicates.
        """
        if world.size == 1:
            return False
        differed = False
        with torch.no_grad():
            for tensor in model.state_dict().values():
                sent = tensor.detach().clone().contiguous()
                world.gradients.broadcast(sent)
                if not torch.equal(sent, tensor):
                    differed = True
                    tensor.copy_(sent)
        return differed

    def wrap(self, micro_step: MicroStep, world: World) -> None:
        """Takes what is to be run in each micro-step.

        Ranks: all, communicates.
        """
        self._micro_step = micro_step
        self._world = world
        self._activity = world.comm.activity
        self._trainable = micro_step.take_trainable()

    def refresh(self) -> None:
        """Wraps anew where parameters were frozen or unfrozen: what is reduced is of the others.

        Raises ConfigError if all are frozen, RankMismatch if ranks froze different ones.

        Ranks: all, communicates.
        """
        trainable = self._micro_step.take_trainable()
        comm = self._world.comm
        # A digest: every rank gets what all say, and this is said in every epoch.
        mine = torch.tensor(int(digest_of(trainable), 16) >> 1)
        everyones = comm.all_gather("trainable parameters", mine)
        if bool((everyones != everyones[0]).any()):
            numbers = comm.gather_objects("numbers of trainable parameters", len(trainable))
            counts = ", ".join(f"{number} on rank {rank}" for rank, number in enumerate(numbers))
            raise RankMismatch(f"ranks train different parameters: {counts}; freeze alike on all")
        if trainable == self._trainable:
            return
        for parameter in self._micro_step.parameters():
            parameter.grad = None  # views into the old buckets
        self.wrap(self._micro_step, self._world)

    def clear(self, optimizer: Optimizer) -> None:
        """Forgets the gradients of the step before, those that the optimizer does not have, too."""
        for p in self._micro_step.trainable:
            p.grad = None
        for group in optimizer.param_groups:  # some may have been unfrozen since
            for p in group["params"]:
                p.grad = None
        if optimizer.zero_grad != MethodType(Optimizer.zero_grad, optimizer):
            optimizer.zero_grad(set_to_none=True)  # it may do more

    @abstractmethod
    def run(self, step: Step, feed: MicroBatches, last: bool) -> None:
        """Runs forward and backward; gradients are reduced in the last micro-batch.

        Ranks: all; communicates where ``last``.
        """

    @abstractmethod
    def heard(self) -> Heard:
        """Returns what all ranks said in the step, after its last micro-batch.

        Raises UnusedParameters, as :meth:`check_arrived` does.
        """

    def gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """Returns tensors that hold all gradients of the optimizer, and otherwise zeros only.

        What is done to them in place is done to the gradients. They may be fewer than those.
        """
        groups = optimizer.param_groups
        return [g for group in groups for p in group["params"] if (g := p.grad) is not None]

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        """Returns the joint Euclidean norm of the gradients, 0-dim; nobody waits for it."""
        return joint_norm(self.gradients(optimizer))

    @abstractmethod
    def check_arrived(self) -> None:
        """Raises UnusedParameters for those without a gradient, where nobody waits for the lane."""

    def unused(self) -> UnusedParameters:
        """Returns the error for a step that turns out to have met no other rank's."""
        named = self._micro_step.model.named_parameters()
        names = [name for name, p in named if p.requires_grad and p.grad is None]
        return UnusedParameters(
            f"no gradient reached {', '.join(names) or 'some parameters'}, so the ranks' "
            "gradients could not be summed and nothing was updated. Use the parameters in every "
            "loss, freeze them (`p.requires_grad_(False)` before the Trainer is made), or allow "
            f"it with `strategy={type(self).__name__}(find_unused_parameters=True)`."
        )


def joint_norm(grads: list[Tensor]) -> Tensor:
    """Returns the Euclidean norm of all entries, in the bits of ``torch.nn.utils``."""
    # Of an embedding's, those that are not zero by construction: it may be sparse.
    entries = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    if len({(one.device, one.dtype) for one in entries}) != 1:
        return torch.nn.utils.get_total_norm(entries)
    one = entries[0] if len(entries) == 1 else torch.stack(torch._foreach_norm(entries))
    norm: Tensor = torch.linalg.vector_norm(one)
    return norm
