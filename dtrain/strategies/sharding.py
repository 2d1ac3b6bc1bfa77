"""A model that is sharded, within the module that is run in each micro-step."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from dtrain.context import Step, parts_of
from dtrain.data import MicroBatches
from dtrain.distributed import World, copies_of, named_parameters, own_part, placed_like
from dtrain.step import MicroStep, joint_norm
from dtrain.strategies.following import Following
from dtrain.strategies.layout import Layout
from dtrain.strategies.options import Options
from dtrain.strategies.refusals import refuse_copies, refuse_early_backward
from dtrain.strategies.tape import ORDER_SLOTS, Gather, Node, Recorder, Scatter, Tape, same_order
from dtrain.strategies.twins import Twins, slice_model


class _Root(nn.Module):
    """What FSDP has for its root: the micro-step, and a place for what ranks say."""

    def __init__(self, micro_step: MicroStep, place: nn.Parameter) -> None:
        super().__init__()
        self.micro_step, self.place = micro_step, place  # last: so it is in the reduction

    def forward(self, fn: Callable[[], Any]) -> Any:
        """Runs ``fn``, and returns what to call backward on, if that is what it returns."""
        returned = fn()
        if not isinstance(returned, tuple):
            return None
        # Of a view, FSDP warns.
        terms = [term.clone() if term._base is not None else term for term in returned]
        # With a gradient in each micro-batch: it is added up in the same dtype as all others.
        return [*terms, self.place.sum() * 0] if terms else []


class Sharding:
    """Blocks and the root, sharded; the optimizer has the sharded parameters in place of the whole.

    Attributes:
        root: runs a function within FSDP's root.
        place: what all ranks said comes back as its gradient.
        parts: the sharded modules by name; the root's is empty.
        twins: those that compute the same batches as this rank, if there are any.
        following: how a rank takes part that does not know their order.

    Ranks: all, communicates.
    """

    def __init__(
        self,
        micro_step: MicroStep,
        blocks: dict[str, nn.Module],
        world: World,
        message: Callable[[], Tensor],
        options: Options,
        layout: Layout,
    ) -> None:
        model, lane = micro_step.model, micro_step.lane
        dtype = options.dtype
        groups, mesh = layout.groups, layout.mesh
        self._size, self._dtype = layout.replicas * layout.ranks, dtype
        self._message, self._micro_step, self._world = message, micro_step, world
        self.twins: Twins | None = None
        if layout.slices is not None:
            self.twins = Twins(layout.slices.get_group(), world.comm.activity, micro_step)
        slots = lane.param.numel() + ORDER_SLOTS
        self.place = nn.Parameter(lane.param.new_zeros(groups.row.size(), slots))
        del micro_step.lane_param
        root = _Root(micro_step, self.place)
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=None if dtype is None else lane.param.dtype
        )
        # Only an accelerator copies from pinned memory, and on CPUs there may be none to pin it.
        pin = world.device.type != "cpu"
        offload = CPUOffloadPolicy(pin_memory=pin) if options.offload else OffloadPolicy()
        optimizer = micro_step.context.optimizer
        before = _names_of(optimizer, model)
        whole = [weakref.ref(p) for p in model.parameters()]
        if layout.slices is not None:
            slice_model(model, layout.slices, options.plan)
        for block in [*blocks.values()][::-1]:  # one within another comes first
            fully_shard(
                block,
                mesh=mesh,
                reshard_after_forward=options.reshard,
                mp_policy=policy,
                offload_policy=offload,
            )
        # The model's own rest, which backward needs at once, is kept as FSDP's root keeps it.
        self._fsdp = fully_shard(root, mesh=mesh, mp_policy=policy, offload_policy=offload)
        self.root: nn.Module = root  # the same, of another class
        _exchange(optimizer, model, before)
        if held := _still_there(whole):
            micro_step.context.say(
                f"note: {held} of the model's parameters are held elsewhere, as they were before "
                "they were sharded (a list of them, or a closure): these stay in memory, whole, "
                "and are not what is trained. Let go of them, and look at the model's own"
            )
        self.place = root.place
        self.tape = Tape(world.comm.activity)
        self.parts: dict[str, FSDPModule] = {}
        modules: dict[str, nn.Module] = {}
        for name, module in self.root.named_modules():
            if isinstance(module, FSDPModule):
                is_root = not name
                self.parts[name] = module
                modules[name] = self.root.get_submodule(name)
                module.set_custom_all_gather(Gather(self.tape, name))
                said = self._say if is_root else None
                module.set_custom_reduce_scatter(Scatter(self.tape, name, said, groups.column))
                # A sum, and no division before it, which float64 would get.
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
        self._fsdp.set_reduce_scatter_unused_params(True)
        self.following = Following(self.parts, self.tape, world.comm)
        self.recorder = Recorder(modules, self.tape)
        self.recorder.watch()
        self._in_forward = False
        states = [part._get_fsdp_state() for part in self.parts.values()]
        refuse_early_backward(states, lambda: self._in_forward)
        refuse_copies(model)
        model.register_forward_pre_hook(self._look, prepend=True)
        if dtype is not None:
            # FSDP casts what its root is given, and that is not the model here.
            model.register_forward_pre_hook(self._cast_inputs, with_kwargs=True)
            model.register_forward_hook(self._cast_outputs)

    def _look(self, module: nn.Module, args: Any) -> None:
        self.tape.check_open("the model")

    def _cast_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda x: _cast(x, self._dtype), (args, kwargs))

    def _cast_outputs(self, module: nn.Module, args: Any, output: Any) -> Any:
        return tree_map(lambda x: _cast(x, self.place.dtype), output)

    def run(self, fn: Callable[[], Any], *, tells: bool) -> tuple[Any, Node | None]:
        """Runs ``fn`` within the root's forward; returns also which modules ran, if all ended.

        Where this rank ``tells``, it says of each module that it gathers it. Ranks: all,
        communicates.
        """
        self.tape.open()
        if tells:
            self.following.begin()
        self.recorder.begin()
        self._in_forward = True
        try:
            returned = self.root(fn)
        finally:
            self._in_forward = False
        self.following.check()
        return returned, self.recorder.end()

    def forward(self, step: Step, feed: MicroBatches, last: bool) -> tuple[Tensor, ...]:
        """Runs the micro-step's forward. Ranks: all, communicates."""
        if self.twins is None:
            return self._micro_step.forward(step, feed, last)
        return self.twins.forward(self._micro_step, step, feed, last)

    def joined(self, message: Tensor) -> Tensor:
        """Returns what this rank and its twins say. Ranks: all, communicates."""
        return message if self.twins is None else self.twins.joined(message)

    def _say(self) -> Tensor:
        message = self.joined(self._message())
        return torch.cat([message, torch.tensor(self.tape.order(), dtype=message.dtype)])

    def own_parts(self, gradients: list[Tensor]) -> list[Tensor]:
        """Returns what this rank holds of them. Local."""
        self._copies = [copies_of(gradient) for gradient in gradients]
        return [own_part(gradient) for gradient in gradients]

    def norm_of(self, gradients: list[Tensor]) -> Tensor:
        """Returns the joint norm of what :meth:`own_parts` has returned, 0-dim.

        Each row counts once, on however many ranks it is. Ranks: all, communicates.
        """
        norms = []
        for copies in {*self._copies}:
            pairs = zip(gradients, self._copies, strict=True)
            norms.append(joint_norm([own for own, of in pairs if of == copies]) / copies**0.5)
        squares = torch.stack(norms).double().square().sum()
        self._world.gradients.all_reduce(squares)
        return squares.sqrt().to(norms[0].dtype)

    def play(self, plan: Node) -> None:
        """Does what this rank has not done of a micro-step, as a phantom.

        Ranks: all, communicates.
        """
        self.tape.rewind()
        self.reset()
        zero = torch.zeros((), device=self.place.device, requires_grad=torch.is_grad_enabled())
        end = self.recorder.play(plan, zero)
        if end.requires_grad:
            end.backward()

    def reset(self) -> None:
        """Has modules hold sharded parameters, wherever a forward or backward was left."""
        self._fsdp.reset_iter_state()

    def reduces(self, last: bool) -> None:
        """Says whether the next backward reduces gradients, or adds them up."""
        self._fsdp.set_requires_gradient_sync(last)

    def said(self) -> Tensor:
        """Returns the sum over ranks of what each has said."""
        grad = self.place.grad
        assert grad is not None
        row: Tensor = grad.to_local()[0]  # type: ignore[attr-defined]
        return row

    def same_order(self, row: Tensor) -> bool:
        """Says whether all ranks' modules came in the same order; equal on all ranks."""
        return same_order(row[-ORDER_SLOTS:].tolist(), self._size)


def _still_there(params: list[weakref.ref[nn.Parameter]]) -> int:
    """Says how many somebody holds still."""
    if any(p() is not None for p in params):
        gc.collect()  # a model that is let go of has loops
    return sum(p() is not None for p in params)


def _cast(x: Any, dtype: torch.dtype | None) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _names_of(optimizer: Optimizer, model: nn.Module) -> dict[int, str]:
    """Returns the names of the optimizer's parameters, by identity."""
    names = {id(p): name for name, p in named_parameters(model)}
    return {id(p): names[id(p)] for group in optimizer.param_groups for p in group["params"]}


def _exchange(optimizer: Optimizer, model: nn.Module, names: dict[int, str]) -> None:
    """Gives the optimizer the sharded parameters, and of its state this rank's rows."""
    now = dict(named_parameters(model))
    states = {names[id(p)]: state for p, state in optimizer.state.items() if id(p) in names}
    for held in optimizer.param_groups:
        held["params"] = [now[names[id(p)]] for p in held["params"]]
    for part in parts_of(optimizer).values():
        part.state.clear()
        mine = {id(p) for held in part.param_groups for p in held["params"]}
        for name, state in states.items():
            if id(now[name]) in mine:
                part.state[now[name]] = {
                    key: placed_like(value, now[name]) if isinstance(value, Tensor) else value
                    for key, value in state.items()
                }
