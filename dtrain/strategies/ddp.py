"""Torch's DistributedDataParallel: gradients meet in buckets while backward still runs."""

import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from operator import attrgetter, is_
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dtrain.callback import Callback
from dtrain.context import Step
from dtrain.data import MicroBatches
from dtrain.distributed import BACKWARD, OWN_BACKWARD, DataParallel, World
from dtrain.errors import ConfigError, DtrainError
from dtrain.step import Heard, LaneSilent, MicroStep, Strategy, joint_norm, of_backward

# 2.13 renamed the argument; 2.11 has only the old name.
_ARGUMENTS = inspect.signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = (
    "forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers"
)

_GRAD = attrgetter("grad")


class DDP(Strategy):
    """Reduces gradients with DistributedDataParallel. In a world of one it wraps nothing.

    Buffers (such as BatchNorm's running statistics) are not sent in each step; rank 0's go to all
    ranks before an evaluation and a checkpoint, at the end, and with reports where they differ.

    Args:
        find_unused_parameters: set it where a step may leave parameters without gradient.
        static_graph: the graph is the same in every step; not with accumulation.
        bucket_cap_mb: size of a bucket of gradients, in MiB; torch's default (25, and 1 for the
            first) if None.
        sync_batchnorm: BatchNorm takes its statistics over all ranks' samples. Ranks then wait for
            one another inside of the model, so each needs a batch in every micro-step: a skip, or
            a rank without data, is an error.
        comm_hook: what reduces each bucket instead of an all-reduce, as a pair of its state and
            itself (see ``torch.distributed.algorithms.ddp_comm_hooks``); such as a compression.
            What ranks say to one another then travels in a reduction of its own, uncompressed.

    Ranks: all, communicates.
    """

    def __init__(
        self,
        *,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        bucket_cap_mb: float | None = None,
        sync_batchnorm: bool = False,
        comm_hook: tuple[Any, Callable[..., Any]] | None = None,
    ) -> None:
        self.find_unused = find_unused_parameters
        self._static_graph = static_graph
        self._bucket_cap_mb = bucket_cap_mb
        self._sync_batchnorm = sync_batchnorm
        self._comm_hook = comm_hook
        self._ddp: DataParallel | None = None
        self._checked = False  # whether each parameter has a gradient
        self._gradients: list[Tensor] = []  # of the last step, if they are parts of buckets,
        self._places: list[int] = []  # where they are in memory, and
        self._joined: list[Tensor] = []  # the stretches of it that they fill
        self._seen: list[Tensor | None] = []  # the gradients of the last reduction; of the dense
        self._views: list[Tensor] = []  # ones, which are views into buckets, where they are, and
        self._homes: list[int] = []  # the same views, which nobody else has
        self._twins: list[Tensor] = []

    def check(self, *, accumulates: bool, callbacks: Sequence[Callback] = ()) -> None:
        if self._static_graph and accumulates:  # where DDP's own assertion would fail
            raise ConfigError(
                "DDP(static_graph=True) cannot work with gradient accumulation: its graph changes "
                "between the first micro-batch and the last. Remove one of them."
            )

    def prepare_model(self, model: nn.Module, world: World) -> nn.Module:
        self.may_idle = True
        if world.size == 1:
            return model
        has_sync = any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        if world.device.type == "cpu" and (has_sync or self._sync_batchnorm):
            raise ConfigError(
                "SyncBatchNorm works on GPUs only, and this rank computes on the CPU: leave "
                "sync_batchnorm out here (BatchNorm then sees its own rank's samples), or use "
                "GroupNorm or LayerNorm"
            )
        if self._sync_batchnorm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.may_idle = not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
        return model

    def wrap(self, micro_step: MicroStep, world: World) -> None:
        super().wrap(micro_step, world)
        self._checked = False
        if world.size == 1:
            return
        if self._ddp is None:
            # Weakly: the world outlives the model.
            release = WeakMethod(self._release)
            world.at_close(lambda: (method := release()) and method())
        self._release()
        self._ddp = ddp = world.gradients.data_parallel(
            micro_step,
            bucket_cap_mb=self._bucket_cap_mb,
            find_unused_parameters=self.find_unused,
            gradient_as_bucket_view=True,
            static_graph=self._static_graph,
            init_sync=False,  # the Trainer has made models equal, and said so
            **{_SYNC_BUFFERS: False},
        )
        micro_step.tie()
        if self._comm_hook is not None:
            ddp.register_comm_hook(*self._comm_hook)
        if not (self.find_unused or self._static_graph):
            # DDP rebuilds its buckets once, after the first step of a process, and with them the
            # order in which more than two ranks are added up. A run that is resumed would then
            # differ in the last bits from one that never stopped. So they take an idle step now.
            micro_step.lane.open()
            micro_step.lane.backward(*ddp(Step(number=0), None, True))
            for parameter in micro_step.parameters():
                parameter.grad = None

    def describe(self) -> str:
        return "gradients: in buckets, during backward (strategy='ddp')"

    def _release(self) -> None:
        self._ddp = None
        self._gradients, self._places, self._joined = [], [], []
        self._seen, self._views, self._homes, self._twins = [], [], [], []

    def run(self, step: Step, feed: MicroBatches, last: bool) -> None:
        ddp = self._ddp
        if [*map(Tensor.data_ptr, self._views)] != self._homes:
            # Others are in them: `p.grad.data = ...`, or a model that was moved.
            for view, twin in zip(self._views, self._twins, strict=True):
                view.data = twin
        forward = self._micro_step if ddp is None else ddp
        with nullcontext() if last or ddp is None else ddp.no_sync():
            terms = forward(step, feed, last)
            # It works in a last backward, too, but nobody could tell from when on it only waits.
            self._activity.enter(BACKWARD if last and ddp is not None else OWN_BACKWARD)
            try:
                if not last:
                    terms = (None, *terms)
                self._micro_step.lane.backward(*terms)
            except RuntimeError as error:
                raise of_backward(error)  # noqa: B904 -- the same, or one that has it as its cause

    def gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """Returns the stretches of buckets that gradients fill: a few tensors instead of many."""
        grads = super().gradients(optimizer)
        if self._ddp is None:
            return grads
        # A sparse gradient is nowhere, and comes anew in each step.
        places = [grad.data_ptr() if grad.layout is torch.strided else 0 for grad in grads]
        if places == self._places and all(map(is_, grads, self._gradients)):
            return self._joined
        joined = _joined(grads)
        if len(joined) < len(grads):  # buckets, which stay; all else comes anew in each step
            self._gradients, self._places, self._joined = grads, places, joined
        return joined

    def gradient_norm(self, optimizer: Optimizer) -> Tensor:
        # Parameter by parameter: so it has the bits of a hand-written loop's.
        return joint_norm(super().gradients(optimizer))

    def norm_is_of(self, gradients: list[Tensor]) -> bool:
        return gradients is not self._joined

    def _keep_views(self, grads: list[Tensor | None]) -> None:
        """Keeps in mind where the buckets' views are, which DDP hands out and relies on."""
        self._seen = grads
        self._views = [g for g in grads if g is not None and g.layout is torch.strided]
        self._homes = [*map(Tensor.data_ptr, self._views)]
        self._twins = [view.detach() for view in self._views]

    def heard(self) -> Heard:
        if self._ddp is not None:
            grads = [*map(_GRAD, self._micro_step.trainable)]
            if not (self._seen and all(map(is_, grads, self._seen))):
                self._keep_views(grads)
        reduced = None
        if self._ddp is not None and self._comm_hook is not None:
            # In a bucket the hook may have altered it.
            reduced = self._micro_step.lane.message() / self._world.size
            self._world.gradients.all_reduce(reduced)
        try:
            heard = self._micro_step.lane.listen(reduced)
            # Here nothing waits for a missing gradient. It is refused all the same, so that a
            # script that runs on one rank runs on two.
            unwatched = self._ddp is None or self._comm_hook is not None
            if unwatched and not self._checked and heard.verdict().weight:
                self._checked = True
                self.check_arrived()
        except LaneSilent as silent:
            raise self.unused() from silent
        return heard

    def missing(self) -> list[str]:
        names = super().missing()
        if names or not isinstance(self._ddp, DistributedDataParallel):
            return names
        # An earlier micro-batch reached them, and the last did not, as only DDP can tell.
        named = [n for n, p in self._micro_step.named_parameters() if p.requires_grad]
        try:
            self._ddp._check_reducer_finalized()
        except RuntimeError as unfinished:
            told = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(unfinished))
            names = [named[int(place)] for place in told[1].split()] if told else []
        return [f"{name.removeprefix('model.')} (in the last micro-batch)" for name in names]

    def unused(self) -> DtrainError:
        if not self._static_graph or super().missing():
            return super().unused()
        return ConfigError(
            "with DDP(static_graph=True) gradients came in another number than in the first step, "
            "so they could not be summed. A parameter was not used; or a rank had no batch or left "
            "it out, where a block runs more than once under checkpoint(use_reentrant=True). Pass "
            "use_reentrant=False, or leave out static_graph"
        )

    def check_arrived(self) -> None:
        params = () if self.find_unused else self._micro_step.trained.mine()
        if any(p.grad is None for p in params):
            raise self.unused()


def _joined(grads: list[Tensor]) -> list[Tensor]:
    """Returns flat tensors that cover these: one for each stretch that they fill without gaps."""
    flats: list[Tensor] = []
    rest: list[Tensor] = []
    for grad in grads:
        # A sparse one has no place, and one with other strides leaves gaps.
        dense = grad.layout is torch.strided and (
            grad.is_contiguous() or grad.is_contiguous(memory_format=torch.channels_last)
        )
        (flats if dense and grad.numel() else rest).append(grad)
    joined: list[Tensor] = []
    end = None
    for grad in sorted(flats, key=Tensor.data_ptr):
        place, size = grad.storage_offset(), grad.numel()
        where = grad.untyped_storage().data_ptr(), grad.dtype
        if (*where, place) == end:
            last = joined.pop()
            joined.append(last.as_strided((last.numel() + size,), (1,), last.storage_offset()))
        else:
            joined.append(grad.as_strided((size,), (1,), place))
        end = (*where, place + size)
    return joined + rest
