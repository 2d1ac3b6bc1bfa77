"""What strategies have in common whose ranks each have the whole model."""

from types import MethodType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.distributed import Activity, World, digest_of
from dtrain.errors import RankMismatch, UnusedParameters
from dtrain.step import MicroStep, Strategy


class Replicated(Strategy):
    """Each rank has the whole model, and after the reduction all gradients.

    Ranks: all, communicates.
    """

    # Since `wrap`.
    _micro_step: MicroStep
    _world: World
    _activity: Activity
    _trainable: list[int]

    def make_equal(self, model: nn.Module, world: World) -> bool:
        """Gives all ranks rank 0's parameters and buffers; returns whether any differed here."""
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

    def _take(self, micro_step: MicroStep, world: World) -> None:
        self._micro_step = micro_step
        self._world = world
        self._activity = world.comm.activity
        self._trainable = micro_step.take_trainable()

    def refresh(self) -> None:
        """Wraps anew where parameters were frozen or unfrozen: what is reduced is of the others."""
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

    def gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """Returns the gradient of each of the optimizer's parameters that has one."""
        groups = optimizer.param_groups
        return [g for group in groups for p in group["params"] if (g := p.grad) is not None]

    def unused(self) -> UnusedParameters:
        """Names the parameters whose gradients never arrived."""
        named = self._micro_step.model.named_parameters()
        names = [name for name, p in named if p.requires_grad and p.grad is None]
        return UnusedParameters(
            f"no gradient reached {', '.join(names) or 'some parameters'}, so the ranks' "
            "gradients could not be summed and nothing was updated. Use the parameters in every "
            "loss, freeze them (`p.requires_grad_(False)` before the Trainer is made), or allow "
            f"it with `strategy={type(self).__name__}(find_unused_parameters=True)`."
        )
