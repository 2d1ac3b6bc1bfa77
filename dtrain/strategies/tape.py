"""What a rank's sharded modules have gathered and scattered, and how it makes up what it missed.

Sharded modules meet in each forward and backward. A rank that is without a batch, skips one or
fails in the middle has to be there all the same: as a *phantom*, it runs FSDP's own hooks around
forwards of nothing, in the recorded order. What it had done before is not done again.

What of torch is used here is private to it; of 2.13.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._common_utils import collect_grad_tensors
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from dtrain.distributed import GATHERING, SCATTERING, Activity
from dtrain.errors import ConfigError, RankMismatch
from dtrain.strategies.twins import zeros_like_later

_DIGEST = 2**24  # what is kept of a step's order
_PIECE = 64  # it travels in pieces, whose squares float32 can add up over 4096 ranks
PIECES = 4
#: How many numbers tell the others in which order a rank's modules came.
ORDER_SLOTS = 2 * PIECES


class Node(NamedTuple):
    """A call of a sharded module, and of those within it."""

    name: str
    tied: bool  # some input required a gradient: else its gradients come later
    grad: bool  # gradients were enabled
    children: tuple["Node", ...]


class Tape:
    """The order of this rank's collectives.

    Args:
        activity: told while this rank waits for others, within its forward or backward.
    """

    def __init__(self, activity: Activity) -> None:
        self.activity = activity
        self.is_open = False  # all ranks are in a forward, or in its backward
        self.is_phantom = False
        self.adds_up = False  # gradients of earlier micro-batches are kept in the reduction's dtype
        self.done: list[str] = []  # in this micro-step, by kind and module
        self._left: list[str] | None = None  # of what was done, not come to again by a phantom
        self._digest = 1  # of the whole step
        #: In this micro-step: parameters that had no gradient when they were to be reduced, and
        #: those that had. A module that is called twice is reduced twice.
        self.unused: list[str] = []
        self.used: set[str] = set()
        #: Called with a module's name before it is gathered.
        self.announce: Callable[[str], None] | None = None

    def begin_step(self) -> None:
        self._digest = 1

    def open(self) -> None:
        """A micro-step begins, or a batch of an evaluation."""
        self.done, self._left, self.unused, self.used = [], None, [], set()
        self.is_open, self.is_phantom = True, False

    def close(self) -> None:
        self.is_open, self.announce = False, None

    def rewind(self) -> None:
        """A phantom begins, which does not do again what was done."""
        self._left, self.is_phantom, self.announce = self.done[::-1], True, None

    def check_open(self, name: str) -> None:
        """Raises ConfigError where a module is run that other ranks do not run now."""
        if not self.is_open:
            raise ConfigError(
                f"a sharded module ({name}) was run outside of a training step and of an "
                "evaluation, where other ranks do not run it: call the model in the loss function, "
                "or use Trainer.evaluate and Trainer.predict"
            )

    def goes_on(self, kind: str, name: str) -> bool:
        """Notes a collective; returns whether it is to be made, for it may have been."""
        self.check_open(name)
        event = f"{kind} {name}"
        if self._left:
            if (expected := self._left.pop()) != event:
                raise RankMismatch(
                    f"this rank cannot take part in the rest of the step: it has done {expected!r} "
                    f"where {event!r} was recorded. Run the same sharded modules, in the same "
                    "order, in each micro-batch, and no backward() in the loss function"
                )
            return False
        if self.announce is not None:
            self.announce(name)
        if self._left is None:
            self.done.append(event)
        self._digest = (self._digest * 31 + zlib.crc32(event.encode())) % _DIGEST
        return True

    def order(self) -> list[float]:
        """Returns what shows, summed over ranks, whether their steps had the same order."""
        pieces = [self._digest // _PIECE**i % _PIECE for i in range(PIECES)]
        return [float(n) for piece in pieces for n in (piece, piece * piece)]


def same_order(summed: list[float], size: int) -> bool:
    """Says whether all ranks had the same order; equal on all ranks.

    By Cauchy and Schwarz, so many times the sum of squares is the square of the sum only where all
    numbers are equal. The sums are exact.
    """
    pairs = zip(summed[::2], summed[1::2], strict=True)
    return all(size * round(squares) == round(total) ** 2 for total, squares in pairs)


class Gather(DefaultAllGather):
    """Gathers a module's parameters, if the tape says so."""

    def __init__(self, tape: Tape, name: str) -> None:
        self._tape, self._name = tape, name

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Ranks: all, communicates."""
        if self._tape.goes_on("gather", self._name):
            before = self._tape.activity.enter(GATHERING)
            work = super().__call__(output_tensor, input_tensor, group, async_op)
            self._tape.activity.enter(before)  # where it raised, it was in the gather
            return work
        output_tensor.zero_()  # a phantom does not look at values
        return None


class Scatter(DefaultReduceScatter):
    """Sums a module's gradients over ranks, and hands out rows, if the tape says so.

    With those of the root goes what this rank has to say to all others: written in each one's rows,
    where they are last, in the precision of the reduction. Where several replicas of the model are
    sharded, rows are then summed over those who hold the same, the ``column``.
    """

    def __init__(
        self,
        tape: Tape,
        name: str,
        message: Callable[[], Tensor] | None,
        column: dist.ProcessGroup | None,
    ) -> None:
        self._tape, self._name, self._message, self._column = tape, name, message, column

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        """Ranks: all, communicates."""
        if not self._tape.goes_on("scatter", self._name):
            output_tensor.zero_()
            return None
        if self._message is not None:
            message = self._message()
            rows = input_tensor.view(group.size(), -1)
            rows[:, -message.numel() :] = message.to(rows)
        before = self._tape.activity.enter(SCATTERING)
        work = super().__call__(output_tensor, input_tensor, group, op, async_op)
        if self._column is not None:
            # Here, not by a mesh of two dimensions: a phantom does not make it up twice.
            if work is not None:
                work.wait()
            dist.all_reduce(output_tensor, op, self._column)
        self._tape.activity.enter(before)
        return work


class _Watched(FSDPParam):
    """Says whether it has a gradient when it is reduced; FSDP takes zeros where it has none."""

    _tape: Tape

    @property
    def unsharded_grad_data(self) -> Tensor:
        self._tape.used.add(str(self._param_fqn))
        return super().unsharded_grad_data

    @property
    def unsharded_accumulated_grad_data(self) -> Tensor:
        self._tape.used.add(str(self._param_fqn))
        return super().unsharded_accumulated_grad_data

    @property
    def unsharded_zero_grad_data(self) -> Tensor:
        if not self._tape.is_phantom:
            self._tape.unused.append(str(self._param_fqn))
        # Of the dtype of the others', which may have been added up in that of the reduction.
        dtype = self.reduce_dtype if self._tape.adds_up else None
        zeros = torch.zeros_like(self.unsharded_param, dtype=dtype)
        return self._get_grad_inner_tensor(zeros)


def _refuse(name: str, grad: Tensor) -> None:
    """Raises ConfigError: autograd came to rows, to which FSDP brings their gradients itself."""
    raise ConfigError(
        f"the loss was computed with rows of {name.removeprefix('micro_step.model.')}, outside of "
        "the model's forward, and their gradient would be of this rank's loss only. For a penalty "
        "use callbacks.L1L2Penalty, or compute it within the forward of the module that has the "
        "parameter"
    )


class _Tie(torch.autograd.Function):
    """Hands on what it gets; in backward, every parameter gets zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *params: Tensor) -> Tensor:
        ctx.zeros = [zeros_like_later(p) for p in params]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *(zeros() for zeros in ctx.zeros)


class Recorder:
    """Notes which sharded modules are called, in which order, one within another; and plays that.

    Args:
        parts: the sharded modules, by name; the root's is empty.
        tape: what they gather and scatter.
    """

    def __init__(self, parts: Mapping[str, nn.Module], tape: Tape) -> None:
        self._tape = tape
        self._parts = dict(parts)
        self._states = {n: m._get_fsdp_state() for n, m in self._fsdp_parts()}
        self._names = {id(module): name for name, module in parts.items()}
        self._stack: list[tuple[str, bool, bool, int, list[Node]]] = []
        self._top: list[Node] = []
        self._is_on = False
        #: Where parameters of the root were written to, which is no error of the loss function's.
        self.wrote: ConfigError | None = None
        for module in parts.values():
            module.register_forward_pre_hook(
                torch._dynamo.disable(self._enter),
                with_kwargs=True,
            )
            module.register_forward_hook(torch._dynamo.disable(self._leave))

    def _fsdp_parts(self) -> Iterable[tuple[str, FSDPModule]]:
        return ((n, m) for n, m in self._parts.items() if isinstance(m, FSDPModule))

    def watch(self) -> None:
        """Has parameters tell of it where no gradient reached them, or one that nobody reduces."""
        for state in self._states.values():
            for group in state._fsdp_param_groups:
                for param in group.fsdp_params:
                    param.__class__ = _Watched
                    param._tape = self._tape  # type: ignore[attr-defined]
        for name, rows in self._parts[""].named_parameters():
            trains = rows.requires_grad  # it may be thawed
            rows.requires_grad_().register_hook(partial(_refuse, name))
            rows.requires_grad_(trains)

    def begin(self) -> None:
        self._is_on, self._stack, self._top, self.wrote = True, [], [], None

    def end(self) -> Node | None:
        """Returns what was called since :meth:`begin`, if that came to its end."""
        self._is_on = False
        return self._top[0] if self._top and not self._stack else None

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._is_on or torch._C._current_graph_task_id() != -1:
            return  # computed again in backward
        tied = bool(collect_grad_tensors((args, kwargs)))  # as FSDP looks: also in dataclasses
        name = self._names[id(module)]
        self._stack.append((name, tied, torch.is_grad_enabled(), self._written(name), []))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._is_on or torch._C._current_graph_task_id() != -1:
            return
        name, tied, grad, written, children = self._stack.pop()
        if self._written(name) != written:
            error = ConfigError(
                f"parameters of {name.removeprefix('micro_step.model.') or 'the model'} were "
                "written to in the middle of a forward (or in on_batch, on_loss), where they are "
                "gathered, and that is lost: change them in on_step_end, or where a step begins"
            )
            if name:
                raise error  # in the loss function, where it is caught
            self.wrote = error
        siblings = self._stack[-1][-1] if self._stack else self._top
        siblings.append(Node(name, tied, grad, tuple(children)))

    def _written(self, name: str) -> int:
        """Counts writes to a module's gathered parameters."""
        groups = self._states[name]._fsdp_param_groups
        return sum(p._unsharded_param._version for group in groups for p in group.fsdp_params)

    def play(self, node: Node, x: Tensor) -> Tensor:
        """Runs FSDP's hooks as for the recorded calls, around forwards of nothing.

        Ranks: all, communicates.
        """
        module, state = self._parts[node.name], self._states[node.name]
        with torch.set_grad_enabled(node.grad and torch.is_grad_enabled()):
            # Not by calling the module: hooks of the user's would see nothing.
            args, _ = state._pre_forward(module, (x,) if node.tied else (), {})
            y: Tensor = args[0] if args else x
            for child in node.children:
                y = self.play(child, y)
            if torch.is_grad_enabled():
                y = _Tie.apply(y, *self._own(node.name))  # type: ignore[no-untyped-call]
            y = state._post_forward(module, args, y)
        return y if y.requires_grad or not x.requires_grad else x

    def _own(self, name: str) -> list[Tensor]:
        groups = self._states[name]._fsdp_param_groups
        params = [param._unsharded_param for group in groups for param in group.fsdp_params]
        return [param for param in params if param.requires_grad]

    def without_gradient(self) -> list[str]:
        """Returns which parameters have none, once backward has run; but of those scattered.

        To be asked before the root's are.
        """
        names = [name for name in self._tape.unused if name not in self._tape.used]
        for part, state in self._states.items():
            if not part or f"scatter {part}" in self._tape.done:
                continue
            for group in state._fsdp_param_groups:
                for param in group.fsdp_params:
                    known = str(param._param_fqn) in (*names, *self._tape.used)
                    if known or not param.sharded_param.requires_grad:
                        continue
                    whole = getattr(param, "_unsharded_param", None)
                    has = whole is not None and whole.grad is not None
                    if not has and param.unsharded_accumulated_grad is None:
                        names.append(str(param._param_fqn))
        return names

    def forget_gradients(self) -> None:
        """Drops gradients of a step that was left in the middle."""
        for state in self._states.values():
            for group in state._fsdp_param_groups:
                for param in group.fsdp_params:
                    param.unsharded_accumulated_grad = None
                    if hasattr(param, "_unsharded_param"):
                        param._unsharded_param.grad = None
