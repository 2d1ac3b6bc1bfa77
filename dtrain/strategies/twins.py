"""Tensor parallel: ranks that hold one layer's matrices in slices, and compute each batch together.

Such *twins* have the same samples, the same random streams and the same loss. Within a forward and
a backward they wait for one another, so they come there together, or not at all.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Replicate, Shard

from dtrain.context import Context, Step
from dtrain.data import MicroBatches, figure_of, tensors_of
from dtrain.distributed import GATHERING, Activity, digest_of
from dtrain.errors import ConfigError, RankMismatch
from dtrain.step import MicroStep

#: Which modules are sliced how, by name; or a function from the model to that.
SlicePlan = Mapping[str, ParallelStyle] | Callable[[nn.Module], Mapping[str, ParallelStyle]]

#: What transformers' models call them.
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
}
_HEADS = ("num_attention_heads", "num_key_value_heads")
_APART = (
    "this rank and those that compute each batch with it (tensor parallel) parted: some {what}, "
    "and others do not. They have the same samples: hooks and loss functions must skip, fail and "
    "draw random numbers alike on all of them (where one has failed, its error is the cause)"
)
_OTHERS = (
    "this rank has another batch than those that compute each batch with it (tensor parallel). A "
    "stream must give the same to each of them: its part is the rank's number // tensor, of as "
    "many as there are ranks // tensor; and hooks must change batches alike"
)


class Twins:
    """This rank's twins, who come into each forward and backward together.

    Ranks: all, communicates, with the twins only.
    """

    def __init__(self, group: dist.ProcessGroup, activity: Activity, micro_step: MicroStep) -> None:
        self._group, self._activity = group, activity
        self._loss_fn, micro_step.loss_fn = micro_step.loss_fn, self._run_loss_fn
        self._came = False  # into the loss function, in this micro-step
        self._failed: Exception | None = None  # there, where twins may wait for this rank

    def forward(
        self, micro_step: MicroStep, step: Step, feed: MicroBatches, last: bool
    ) -> tuple[Tensor, ...]:
        """Runs a micro-step's forward; in the end all twins have a loss, or none has.

        Raises what was raised in the loss function: others may wait for this rank within the model.
        """
        self._came, self._failed = False, None
        terms = micro_step.forward(step, feed, last)
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        if not self._came:
            self.compare(False, "")
        if (error := self.compare(micro_step.has_loss, "have a loss")) is not None:
            micro_step.fail(error, "loss_fn")
            micro_step.has_loss = False
        return terms

    def joined(self, message: Tensor) -> Tensor:
        """Returns what any of them says: counts of votes, and what is equal."""
        return self._reduced(message, dist.ReduceOp.MAX)

    def _run_loss_fn(self, model: nn.Module, batch: Any, context: Context) -> Any:
        self._came = True
        if (error := self.compare(True, "run the loss function", batch)) is not None:
            raise error
        try:
            return self._loss_fn(model, batch, context)
        except Exception as error:
            self._failed = error
            raise

    def compare(self, does: bool, what: str, batch: Any = None) -> RankMismatch | None:
        """Returns an error on who ``does`` what not all twins do, or with another batch.

        None on the others. The host waits for the answer.
        """
        shapes = [[str(one.dtype), *one.shape] for one in tensors_of(batch)]
        numbers = [float(int(digest_of(shapes), 16) % 2**50), *figure_of(batch)] if does else [0.0]
        numbers += [0.0] * (3 - len(numbers))
        both = [float(does), *numbers, *(-number for number in numbers)]
        all_do, *least = self._reduced(
            torch.tensor(both, dtype=torch.float64), dist.ReduceOp.MIN
        ).tolist()
        if not does:
            return None
        if not all_do:
            return RankMismatch(_APART.format(what=what))
        scale = max(1.0, numbers[-1])
        pairs = zip(least[:3], least[3:], (0.5, 1e-9 * scale, 1e-9 * scale), strict=True)
        if any(-most - lowest > within for lowest, most, within in pairs):
            return RankMismatch(_OTHERS)
        return None

    def _reduced(self, mine: Tensor, op: Any) -> Tensor:
        before = self._activity.enter(GATHERING)
        dist.all_reduce(mine, op, self._group)
        self._activity.enter(before)
        return mine


def slice_model(model: nn.Module, mesh: DeviceMesh, given: SlicePlan | None) -> None:
    """Has this rank hold its slices only; equal models become one. Local.

    Raises ConfigError where the plan slices nothing, not evenly, or one of two that are tied.
    """
    plan = _plan_of(model, given, mesh.size())
    tied: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(p), []).append(name)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    _check_names(model, plan)
    parallelize_module(model, mesh, {**plan}, src_data_rank=None)
    for names in tied.values():
        _tie_again(model, names)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
        placements = p.data.placements if isinstance(p.data, DTensor) else ()
        for placement in placements:
            if isinstance(placement, Shard) and p.shape[placement.dim] % mesh.size():
                raise ConfigError(
                    f"FSDP(tensor={mesh.size()}) cannot slice {name} of the shape {[*p.shape]} "
                    f"evenly in dimension {placement.dim}: leave it out of the plan, or use "
                    "another number"
                )


def _check_names(model: nn.Module, plan: Mapping[str, ParallelStyle]) -> None:
    names = [name.split(".") for name, _ in model.named_modules()]
    for pattern in plan:
        parts = pattern.split(".")
        if not any(len(name) == len(parts) and all(map(fnmatch, name, parts)) for name in names):
            raise ConfigError(
                f"FSDP(plan=...): {pattern!r} names no module of the model; names are those of "
                "model.named_modules(), and * is any one part of one"
            )


def _tie_again(model: nn.Module, names: list[str]) -> None:
    """Makes one of what was one parameter before it was sliced."""
    first, *others = (model.get_parameter(name) for name in names)
    for name, other in zip(names[1:], others, strict=True):
        if other is first:
            continue
        if getattr(other.data, "placements", None) != getattr(first.data, "placements", None):
            raise ConfigError(
                f"FSDP(plan=...): {names[0]} and {name} are one parameter (tied), and the plan "
                "slices them in different ways, or one of them only: slice both alike, or untie "
                "them"
            )
        where, _, key = name.rpartition(".")
        setattr(model.get_submodule(where), key, first)


def _plan_of(model: nn.Module, given: SlicePlan | None, slices: int) -> Mapping[str, ParallelStyle]:
    if given is not None:
        return given(model) if callable(given) else given
    names: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    if not names:
        raise ConfigError(
            f"FSDP(tensor={slices}) needs a plan of which modules are sliced how, and "
            f"{type(model).__name__} brings none (as many of transformers' models do): pass "
            "plan={'blocks.*.up': ColwiseParallel(), 'blocks.*.down': RowwiseParallel()}"
        )
    if unknown := {str(style) for style in names.values() if style not in _STYLES}:
        raise ConfigError(
            f"FSDP(tensor={slices}): {type(model).__name__}'s tp_plan has "
            f"{', '.join(sorted(unknown))}, which has not been tried here: pass a plan"
        )
    heads = {name: getattr(model.config, name, slices) for name in _HEADS}
    if uneven := [f"{name}={count}" for name, count in heads.items() if count % slices]:
        raise ConfigError(
            f"FSDP(tensor={slices}) cannot slice {', '.join(uneven)} evenly: use another number"
        )
    return {name: _STYLES[style]() for name, style in names.items()}


def zeros_like_later(p: Tensor) -> Callable[[], Tensor]:
    """Returns what makes zeros of a parameter's form, whose memory may be freed meanwhile."""
    if not isinstance(p, DTensor):
        shape, dtype, device = p.shape, p.dtype, p.device
        return lambda: torch.zeros(shape, dtype=dtype, device=device)
    mesh, placements, local = p.device_mesh, p.placements, p.to_local()
    shape, dtype, device = local.shape, local.dtype, local.device
    return lambda: DTensor.from_local(
        torch.zeros(shape, dtype=dtype, device=device), mesh, placements, run_check=False
    )
