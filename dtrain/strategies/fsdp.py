"""Torch's fully_shard (FSDP2): each rank holds its rows of parameters, gradients and moments only.

The root of the sharded modules is not the model, but what also runs the loss function. With the
reduction of its gradients, the last of a step, travels what ranks tell one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain import accelerator
from dtrain.callback import Callback
from dtrain.context import Loss, Step
from dtrain.data import MicroBatches
from dtrain.distributed import (
    BACKWARD,
    OWN_BACKWARD,
    World,
    give_rank_0s,
    is_sharded,
    some_of,
    tensors_of_state,
)
from dtrain.errors import ConfigError, DtrainError, RankMismatch, UnusedParameters
from dtrain.meta import Recipe, check_made, move_made, not_made, open_places, place
from dtrain.step import Blocks, Heard, MicroStep, Strategy, blocks_of, joint_norm, of_backward
from dtrain.strategies.blocks import check_model, check_training, words_of
from dtrain.strategies.filling import check_alike, fill
from dtrain.strategies.options import Options, check_torch
from dtrain.strategies.refusals import GATHERS, refuse_whole_weights

if TYPE_CHECKING:
    from dtrain.strategies.sharding import Sharding
    from dtrain.strategies.tape import Node
    from dtrain.strategies.turns import Turns
    from dtrain.strategies.twins import SlicePlan


class FSDP(Strategy):
    """Shards parameters, gradients and the optimizer's state over ranks, by torch's fully_shard.

    Each block is gathered before it runs, and let go of after it (docs/sharded.md). Needs torch
    2.13 and, for now, ranks on CPUs. One rank alone shards nothing.

    Args:
        blocks: what is gathered at once: module classes, their names, or a function from a module's
            name and the module to whether it is one. If None, the model's repeated blocks, as the
            start block says; all else makes one more part.
        reshard: let go of a block's parameters after its forward, and gather them again for its
            backward. False keeps them: more memory, fewer gathers.
        params: ``"bf16"`` gathers and computes in bfloat16; parameters stay in their own precision.
            The model's inputs are cast, and its outputs cast back.
        reduce: in what gradients are summed: ``"float32"`` (or the parameters' own, if None).
        compile: compile each block's forward: True, or a dict of torch.compile's arguments.
        offload: keep parameters, gradients and moments on the host, where updates are made. On CPUs
            they are there in any case.
        checkpoint_activations: compute blocks again in backward, rather than keep what is in them;
            as ``callbacks.CheckpointActivations``, but also beyond fits.
        replicas: how many groups of ranks hold the model, each among themselves, so that gathers
            stay within a group; ``"hosts"``: one on each host. If None, all ranks are one group.
        tensor: how many ranks compute each batch together, with slices of layers (tensor parallel).
        plan: which modules are sliced how: torch's ParallelStyles by the modules' names, or a
            function from the model to that. If None, what transformers' models bring (``tp_plan``).

    Raises:
        ConfigError: another value was given, or torch is too old.

    Ranks: all, communicates.
    """

    find_unused = True  # a rank without a loss takes part as a phantom, not by a term of its loss
    meets_in_forward = True
    no_gathers = GATHERS

    def __init__(
        self,
        *,
        blocks: Blocks | None = None,
        reshard: bool = True,
        params: Literal["bf16"] | torch.dtype | None = None,
        reduce: Literal["float32"] | torch.dtype | None = None,
        compile: bool | dict[str, Any] = False,
        offload: bool = False,
        checkpoint_activations: bool = False,
        replicas: Literal["hosts"] | int | None = None,
        tensor: int = 1,
        plan: SlicePlan | None = None,
    ) -> None:
        self._options = Options(
            *(blocks, reshard, params, reduce, compile, offload, checkpoint_activations, replicas),
            *(tensor, plan),
        )
        self._blocks: dict[str, nn.Module] = {}
        self._sharding: Sharding | None = None  # None where this rank is alone
        self._recipes: dict[str, Recipe] = {}  # what parameters become that are not made yet
        self._turns: Turns | None = None  # of evaluations, likewise
        self._plan: Node | None = None  # in which order modules run; known to all ranks, or to none
        self._reduced = True  # the step's last micro-batch had a backward
        self._spoke = False  # this rank has had a loss in this step
        self._left_over = False  # a step was left in the middle

    def samples_of(self, world: World) -> World:
        each = self._options.tensor
        rank, number = divmod(world.rank, each)
        return replace(world, rank=rank, size=world.size // each, counts=not number)

    # -- before anything runs -------------------------------------------------------------------

    def check(self, *, accumulates: bool, callbacks: Sequence[Callback] = ()) -> None:
        check_torch()
        refuse_whole_weights(callbacks)

    def bring(self, model: nn.Module, world: World) -> nn.Module:
        if world.size == 1:
            return super().bring(model, world)
        check_made(model)
        self._recipes = place(model)
        check_alike(self._recipes, world.comm)
        move_made(model, world.device)
        return model

    def prepare_model(self, model: nn.Module, world: World) -> nn.Module:
        if world.backend == "threads":
            raise ConfigError(
                "strategy='fsdp' needs ranks that are processes: dtrain.testing.run_processes"
            )
        if accelerator.of(world.device) is not None:
            raise ConfigError(
                f"strategy='fsdp' has been run on CPUs only so far, and this rank computes on "
                f"{world.device}: use 'ddp' until it has been measured there"
            )
        self._options.check_world(world.size)
        self._blocks = blocks_of(model, self._options.blocks)
        check_model(model, self._blocks)
        self._options.apply(model, self._blocks)
        return model

    def take(self, micro_step: MicroStep, world: World) -> None:
        self._micro_step, self._world = micro_step, world
        self._activity = world.comm.activity
        with world.comm.lockstep("Trainer(...)"):
            check_training(micro_step)
        if world.size == 1:
            return
        from dtrain.strategies.layout import layout_of
        from dtrain.strategies.sharding import Sharding
        from dtrain.strategies.turns import Turns

        layout = layout_of(self._options.replicas, self._options.tensor, world)
        self._where = layout.words()
        with world.comm.lockstep("Trainer(...)"):
            open_places(micro_step.model)
            self._sharding = Sharding(
                micro_step, self._blocks, world, self._message, self._options, layout
            )
            fill(micro_step.model, self._recipes)
            self._recipes = {}
        self._turns = Turns(self._sharding, micro_step, world)
        micro_step.looks_itself = False
        micro_step.context.sharded = True

    def wrap(self, micro_step: MicroStep, world: World) -> None:
        super().wrap(micro_step, world)
        # The sum over ranks is then their mean.
        micro_step.lane.start = 1 / self.samples_of(world).size
        self._plan = None  # it may have another, now that other parameters are trained

    def describe(self) -> str:
        if self._sharding is None:
            return "nothing is sharded on one rank (fsdp)"
        what = words_of(self._blocks) or "the model as a whole, for no repeated blocks were found"
        rest = ", and the rest" if self._blocks else ""
        held = "parameters, gradients and moments"
        return f"{held}: {self._where}: {what}{rest}{self._options.words()} (fsdp)"

    def make_equal(self, model: nn.Module, world: World) -> bool:
        later = not_made(model, remove_duplicate=False)
        state = tensors_of_state(model).items()
        held = {n: t for n, t in state if not is_sharded(t) and n not in later}
        return give_rank_0s(held, world)

    # -- what is trained ------------------------------------------------------------------------

    def adopt(self, *, in_step: bool = False, waited: bool = False) -> None:
        trained, comm = self._micro_step.trained, self._world.comm
        error = None
        if self._sharding is not None and (
            trained.added() or len(trained.params) != len([*self._micro_step.model.parameters()])
        ):
            error = ConfigError(
                "parameters were added, replaced or removed since the Trainer was made, and with "
                "strategy='fsdp' those are sharded already: change the model before, or use 'ddp'"
            )
        try:
            comm.raise_failures("what is sharded", error, comm.activity.phase.name)
        finally:
            del error  # its traceback has this frame
        super().adopt(in_step=in_step, waited=waited)

    def _reduce_new(self, params: list[nn.Parameter]) -> None:
        """Does nothing: what was thawed before its forward is reduced with all others."""

    def _share(self) -> float:
        return 1.0  # backward began with that

    def clear(self, optimizer: Optimizer) -> None:
        super().clear(optimizer)
        if self._sharding is not None:
            self._sharding.place.grad = None
            if self._left_over:
                self._left_over = False
                self._sharding.recorder.forget_gradients()

    # -- a micro-step ---------------------------------------------------------------------------

    def run(self, step: Step, feed: MicroBatches, last: bool) -> None:
        if step.micro == 0:
            self._spoke = False
        if self._sharding is None:
            self._run_alone(step, feed, last)
        else:
            self._run_sharded(self._sharding, step, feed, last)

    def _run_alone(self, step: Step, feed: MicroBatches, last: bool) -> None:
        micro_step = self._micro_step
        terms = micro_step.forward(step, feed, last)
        self._spoke |= micro_step.has_loss
        self._backward(terms[1:] if last else terms)
        if not last:
            return
        if self._spoke and micro_step.agreement.trouble is None and self._lacks_gradients():
            micro_step.fail(self.unused(), "backward")
        if micro_step.agreement.trouble is not None or not self._spoke:
            self._give_zeros()

    def _give_zeros(self) -> None:
        for p in self._micro_step.trainable:
            p.grad = torch.zeros_like(p)

    def _run_sharded(self, sharding: Sharding, step: Step, feed: MicroBatches, last: bool) -> None:
        micro_step, tape = self._micro_step, sharding.tape
        if step.micro == 0:
            tape.begin_step()
        if last:  # before the forward, in which some parameters are unsharded ones
            micro_step.changed = micro_step.trained.changed()
        tape.adds_up = step.micro > 0
        sharding.reduces(last)
        micro_step.is_followed = tells = self._plan is None
        try:
            # What carries the lane elsewhere is left out.
            terms, plan = sharding.run(
                lambda: sharding.forward(step, feed, last)[int(last) :], tells=tells
            )
            if sharding.recorder.wrote is not None and micro_step.has_loss:
                micro_step.fail(sharding.recorder.wrote, "loss_fn")
                micro_step.has_loss = False
            self._spoke |= micro_step.has_loss
            plan = plan if micro_step.has_loss else None
            if tells:
                if plan is None:
                    sharding.reset()
                self._plan = sharding.following.follow(plan, micro_step)
                self._reduced = self._plan is not None
                if self._plan is None:  # no rank had a loss
                    self._left_over = (
                        True  # of a backward in the loss function, if one failed there
                    )
                    sharding.reset()
                    if last:
                        self._give_zeros()
                    return
            elif plan is not None:
                self._plan = plan
            self._reduced = True
            if micro_step.has_loss and self._backward(terms):
                return
            del terms
            self._left_over = True
            self._activity.enter(BACKWARD)
            assert self._plan is not None
            sharding.play(self._plan)
        except BaseException:
            self._left_over = True
            sharding.reset()  # hooks and the script find sharded parameters
            raise
        finally:
            tape.close()
            micro_step.is_followed = False

    def _backward(self, terms: Sequence[Tensor]) -> bool:
        """Returns whether backward came to its end; what it raises is kept for the others."""
        if not terms:
            return False
        micro_step = self._micro_step
        self._activity.enter(OWN_BACKWARD)
        try:
            micro_step.lane.backward(None, *terms, run=micro_step.backward)
        except Exception as error:
            if isinstance(error, RankMismatch) or self._world.comm.may_be_broken(error):
                raise
            if self._sharding is not None and self._sharding.twins is not None:
                raise  # they may wait for this rank
            micro_step.fail(of_backward(error), "backward")
            return False
        return True

    def _message(self) -> Tensor:
        """Returns what this rank says to the others, which goes with the root's gradients."""
        sharding, micro_step = self._sharding, self._micro_step
        assert sharding is not None
        if not sharding.tape.is_phantom and micro_step.agreement.trouble is None:
            names = sharding.recorder.without_gradient()
            if names:
                plain = sorted(name.removeprefix("micro_step.model.") for name in names)
                micro_step.fail(self._unused(plain), "backward")
        return micro_step.lane.message()

    # -- what all ranks said --------------------------------------------------------------------

    def heard(self) -> Heard:
        lane, world = self._micro_step.lane, self._world
        if self._sharding is None:
            return lane.listen()
        size = self.samples_of(world).size
        if not self._reduced:  # no rank had a loss yet, so that there was no backward
            message = self._sharding.joined(lane.message())
            world.gradients.all_reduce(message)
            return lane.listen(message, parts=world.size)
        row = self._sharding.said()
        if not self._sharding.same_order(row):
            raise RankMismatch(
                "in this step the ranks ran sharded modules in different orders, so each computed "
                "with other modules' weights; nothing was updated. Run the same modules, in the "
                "same order, on all ranks, also where a forward depends on its batch"
            )
        heard = lane.listen(row[: lane.param.numel()].clone(), parts=size)
        if heard.verdict().weight and self._lacks_gradients():
            raise self.unused()
        return heard

    def _lacks_gradients(self) -> bool:
        # One that was frozen since the last step has none.
        return any(p.grad is None and p.requires_grad for p in self._micro_step.trainable)

    def check_arrived(self) -> None:
        """Does nothing: each step is waited for."""

    def unused(self) -> DtrainError:
        return self._unused(self.missing())

    def _unused(self, names: list[str]) -> UnusedParameters:
        return UnusedParameters(
            f"no gradient reached {some_of(names)}, and nothing was updated. Use the parameters in "
            "every loss, or freeze them (`p.requires_grad_(False)`); or use "
            "strategies.DDP(find_unused_parameters=True), which allows it"
        )

    def gradients(self, optimizer: Optimizer) -> list[Tensor]:
        found = super().gradients(optimizer)
        return found if self._sharding is None else self._sharding.own_parts(found)

    def norm_of(self, gradients: list[Tensor]) -> Tensor:
        if self._sharding is None or not gradients:
            return joint_norm(gradients)
        return self._sharding.norm_of(gradients)

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        return self.norm_of(self.gradients(optimizer))

    def norm_is_of(self, gradients: list[Tensor]) -> bool:
        return True

    def look(self, fn: Callable[[], Loss], batch: Any) -> Loss:
        return fn() if self._turns is None else self._turns.look(fn, batch)

    def bring_home(self, model: nn.Module, world: World) -> None:
        if self._sharding is None:
            super().bring_home(model, world)

    # -- evaluation -----------------------------------------------------------------------------

    def meet(self, *, has: bool, ended: bool, first: bool) -> bool:
        if self._turns is None:
            return super().meet(has=has, ended=ended, first=first)
        return self._turns.meet(has=has, ended=ended, first=first)

    def evaluate(self, fn: Callable[[], Any] | None, batch: Any = None) -> Any:
        if self._turns is None:
            return super().evaluate(fn)
        return self._turns.evaluate(fn, batch)
