"""What keeps the replicas of a model equal, and what finds out that they no longer are."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.distributed import copies
from dtrain.distributed.alike import check_same_lines
from dtrain.distributed.comm import Comm
from dtrain.distributed.exchange import digest_of, raw_bytes
from dtrain.distributed.names import named_parameters, named_state
from dtrain.distributed.sharded import is_sharded, own_part, unsharded
from dtrain.distributed.world import World
from dtrain.errors import ConfigError, RankMismatch

_WEIGHTS = 4096  # how many a digest has
_EVERY = 50  # so many steps at least between two looks at a report, after the first as many
_SHOWN = 3

#: Whose buffers are each rank's own until rank 0's go to all: docs/one-is-many.md.
_EXCEPTIONS = {"_NormBase", "_SpectralNorm", "ObserverBase", "FakeQuantizeBase"}


def share_buffers(model: nn.Module, comm: Comm) -> list[str]:
    """Gives all ranks rank 0's buffers, such as BatchNorm's; returns their names.

    What is not persistent may have another shape on each rank, as a cache that grows with its
    batches: that is left alone. Ranks: all, communicates.
    """
    buffers = own_memory(model)
    layout = _layout_of(buffers)
    everyones = comm.all_gather("buffers", torch.tensor(int(digest_of(layout), 16) >> 1))
    shared = list(layout)
    if bool((everyones != everyones[0]).any()):
        shared = _common(comm.gather_objects("buffers, by name", layout))
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name in shared:
        by_device.setdefault(buffers[name][0].device, {})[name] = buffers[name][0]
    for device, held in by_device.items():
        # As bytes: not every dtype can be joined to others, or sent.
        flat = torch.cat([as_bytes(name, buffer) for name, buffer in held.items()])
        flat = comm.broadcast(f"buffers on {device.type}", flat)
        parts = flat.split([buffer.nbytes for buffer in held.values()])
        for buffer, values in zip(held.values(), parts, strict=True):
            # A copy, because a part may begin where no number of that dtype may.
            buffer.copy_(values.clone().view(buffer.dtype).view(buffer.shape))
    return shared


def _layout_of(buffers: Mapping[str, tuple[Tensor, bool]]) -> dict[str, list[Any]]:
    return {
        n: [list(b.shape), str(b.dtype), b.device.type, keep] for n, (b, keep) in buffers.items()
    }


def _digest_of_buffers(model: nn.Module) -> int:
    """Returns a number that hardly any other buffers have, or of other shapes."""
    buffers = own_memory(model)
    layout = int(digest_of(_layout_of(buffers)), 16)
    return hash((layout, *digests(buffer for buffer, _ in buffers.values())))


def _common(by_rank: list[dict[str, list[Any]]]) -> list[str]:
    """Returns which buffers look alike on all ranks; RankMismatch names others of the state."""
    names = {name: None for layout in by_rank for name in layout}
    for name in names:
        found = [layout.get(name) for layout in by_rank]
        if any(one != found[0] for one in found) and any(one and one[-1] for one in found):
            shapes = ", ".join(
                f"{one[0] if one else 'none'} on rank {rank}" for rank, one in enumerate(found)
            )
            raise RankMismatch(
                f"the ranks' buffers {name} do not look alike: {shapes}. What grows with a rank's "
                "own data is no part of the model's state: register_buffer(..., persistent=False)"
            )
    return [
        name
        for name in names
        if all(name in layout for layout in by_rank)
        and len({str(layout[name]) for layout in by_rank}) == 1
    ]


def as_bytes(name: str, tensor: Tensor) -> Tensor:
    """Returns the content of a tensor, flat."""
    return raw_bytes(as_dense(name, tensor).detach().resolve_conj().resolve_neg())


def as_dense(name: str, tensor: Tensor) -> Tensor:
    """Returns the tensor; a ConfigError names one that can neither be sent nor saved."""
    if _is_dense(tensor):
        return tensor
    raise ConfigError(
        f"the model's {name} is {'quantized' if tensor.is_quantized else tensor.layout}, or on the "
        "meta device: it can neither be kept equal on all ranks nor saved. Keep it dense, or as a "
        "plain attribute (no buffer), moved to the device by your own `_apply`, or in the data"
    )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_meta)


def own_memory(model: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    """Returns the buffers by name, and whether each is persistent.

    Expanded ones get a place for each number, without which none can be written; a ConfigError
    names a buffer that cannot be kept equal.
    """
    found: dict[int, tuple[str, Tensor, bool]] = {}
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is None:
                continue
            name = f"{prefix}.{key}" if prefix else key
            if 0 in as_dense(name, buffer).stride():
                module._buffers[key] = buffer = buffer.contiguous()
            keep = key not in module._non_persistent_buffers_set
            found.setdefault(id(buffer), (name, buffer.detach(), keep))
    return {name: (buffer, keep) for name, buffer, keep in found.values()}


def digests(tensors: Iterable[Tensor]) -> list[int]:
    """Returns a number for each, which a tensor of other bits, or of another order, hardly has.

    The device is waited for once. What is not dense has 0.
    """
    return _read([_digest(_words(tensor)) for tensor in tensors])


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor as whole numbers, flat: of 64 bits, which are added up fastest."""
    if not _is_dense(tensor):
        return torch.zeros(1, dtype=torch.int64)
    plain = short = raw_bytes(tensor.detach())
    if plain.nbytes % 8 or plain.data_ptr() % 8:
        plain = short.new_zeros(-(-short.numel() // 8) * 8)
        plain[: short.numel()] = short
    return plain.view(torch.int64)


def _with_one_nan(tensor: Tensor) -> Tensor:
    """Returns the tensor; a copy, in which NaN has always the same bits, where there is any."""
    plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    if not plain.is_floating_point() or plain.element_size() == 1 or not _is_dense(plain):
        return plain
    found = plain.isnan()
    return plain.masked_fill(found, math.nan) if bool(found.any()) else plain


def _digest(words: Tensor) -> Tensor:
    """A weighted sum, modulo 2^64; of a long row, of the sums of a table's columns and rows.

    Two numbers that change places, as those of a count, change it as well. The highest bits, of
    which a sum modulo 2^64 knows little, are brought down first.
    """
    weights, size = _weights(words.device), words.numel()
    if size <= _WEIGHTS:
        return ((words ^ (words >> 32)) * weights[:size]).sum()
    whole = size - size % _WEIGHTS
    columns, rows = torch.zeros_like(weights), []
    # In parts that stay in a cache, or do not take much of a device's memory.
    for part in words[:whole].view(-1, _WEIGHTS).split(16 if words.device.type == "cpu" else 2048):
        mixed = part ^ (part >> 32)
        columns += mixed.sum(0)
        rows.append(mixed.sum(1))
    return (columns * weights).sum() + 3 * _digest(torch.cat(rows)) + 5 * _digest(words[whole:])


@cache
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(17)
    return torch.randint(-(2**62), 2**62, (_WEIGHTS,), generator=generator).to(device) * 2 + 1


@dataclass(eq=False)
class Replicas:
    """Looks whether the ranks' models are still equal, and gives all rank 0's buffers.

    Ranks: all, communicates.
    """

    model: nn.Module
    comm: Comm
    active: bool  # False where there is one rank, or the user does not want it
    step: int = 0  # of the last report
    _told: set[str] = field(default_factory=set)  # names of buffers

    def mark(self, step: int) -> int:
        """Returns a number of 16 bits that is to be equal on all ranks; 0 if it is not due.

        It travels with a report's figures. Ranks: all; communicates where parts have copies.
        """
        before, self.step = self.step, step
        if not self.active or (step >= _EVERY and step // _EVERY == before // _EVERY):
            return 0
        every = unsharded([*self.model.parameters(), *self.model.buffers()])
        mine, parts = digests(every), copies.say(self.model, digests)
        if parts:
            everyones = self.comm.all_gather("parts of the model", torch.tensor(parts))
            mine += parts if copies.differ(everyones) else []  # which are not of equal names
        return hash(tuple(mine)) % 2**16

    def settle(self, when: str, asked: int = 0) -> int:
        """Gives all ranks rank 0's buffers; raises RankMismatch if their parameters differ.

        Returns how often all ranks have ``asked`` for something, which travels along.
        """
        held = digests(unsharded(self.model.parameters())) if self.active else []
        parts = copies.say(self.model, digests) if self.active else []
        mine = [hash(tuple(held)), _digest_of_buffers(self.model), asked, *parts]
        everyones = self.comm.all_gather("model", torch.tensor(mine))
        parameters_differ, buffers_differ, *_ = (everyones != everyones[0]).any(0).tolist()
        if buffers_differ:
            share_buffers(self.model, self.comm)
        if parameters_differ or (parts and copies.differ(everyones[:, 3:])):
            self.tell(when)
        return int(everyones[:, 2].sum())

    def tell(self, when: str) -> str:
        """Raises RankMismatch if parameters differ; if only buffers do, all get rank 0's.

        Returns what to tell the user of these, the first time.
        """
        parameters = {n: p for n, p in named_parameters(self.model) if not is_sharded(p)}
        buffers = dict(self.model.named_buffers())
        # NaN is one thing, whatever its bits.
        mine, parts = (
            dict(zip(held, digests(map(_with_one_nan, held.values())), strict=True))
            for held in (parameters | buffers, copies.copied_parts(self.model))
        )
        said = self.comm.gather_objects("model, by name", (mine, parts))
        if parted := copies.apart([parts for _, parts in said]):
            raise RankMismatch(copies.describe(parted, when) + _CAUSES)
        everyones = [mine for mine, _ in said]
        names = {name: None for one in everyones for name in one}
        apart = [name for name in names if len({one.get(name) for one in everyones}) > 1]
        if changed := {name: parameters[name] for name in apart if name in parameters}:
            raise RankMismatch(self._describe(changed, when))
        shared = [name for name in share_buffers(self.model, self.comm) if name in apart]
        new = [n for n in shared if n not in self._told and not self._is_exception(n)]
        self._told |= {*new}
        if not new:
            return ""
        return (
            f"warning: the ranks' buffers {some_of(new)} differed {when}, as each rank's forward "
            "writes them by its own samples, or a hook by random numbers of its own; all have rank "
            "0's now, and will with each report, evaluation and checkpoint. Reduce what is written "
            "over all ranks (ctx.comm, in on_step_end), or see docs/one-is-many.md"
        )

    def _describe(self, apart: Mapping[str, Tensor], when: str) -> str:
        parted = []
        for name, mine in [*apart.items()][:_SHOWN]:
            wide = mine.detach().to(torch.complex128 if mine.is_complex() else torch.float64)
            gap = (self.comm.broadcast(name, wide) - wide).abs().max().item()
            gaps = self.comm.gather_objects(name, float(gap))
            ranks = ", ".join(f"{gap:.1e} on rank {r}" for r, gap in enumerate(gaps) if gap != 0)
            parted.append(f"  {name}: {ranks or 'other bits of equal value'}")
        if len(apart) > _SHOWN:
            parted.append(f"  and {len(apart) - _SHOWN} more")
        return (
            f"the ranks' parameters were no longer equal {when}; farthest from rank 0's:\n"
            + "\n".join(parted)
            + "\nNo checkpoint is made of them. "
            + (self._cause(apart) or _CAUSES)
        )

    def _cause(self, apart: Iterable[str]) -> str:
        for name in apart:
            where = name.rpartition(".")[0]
            if getattr(self.model.get_submodule(where), "max_norm", None) is not None:
                return (
                    f"Likely cause: {where or 'the model'} has a max_norm, so its forward rewrites "
                    "the rows that its own rank looks up. Leave max_norm out, and bound all rows "
                    "in a callback's on_step_end, alike on all ranks: `weight.data.renorm_(2, 0, "
                    "max_norm)`."
                )
        return ""

    def _is_exception(self, name: str) -> bool:
        kind = type(self.model.get_submodule(name.rpartition(".")[0]))
        return any(base.__name__ in _EXCEPTIONS for base in kind.__mro__)


_CAUSES = (
    "Likely causes: a forward that writes parameters by what its own rank sees (clamping, "
    "initialisation by the first batch); a hook that changes them, their gradients or the "
    "optimizer on one rank, or by random numbers of its own. Change them alike on all ranks, in "
    "on_step_end, or before the Trainer is made, which gives all ranks rank 0's. Machines of "
    "different kinds may round differently: if that is all, pass Trainer(check_ranks=False)."
)


def some_of(names: Sequence[str], most: int = _SHOWN) -> str:
    """Returns the first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


@torch.no_grad()
def not_finite(model: nn.Module) -> list[str]:
    """Returns the names of parameters that are NaN or infinite, and of buffers with NaN.

    (A mask is infinite.) The device is waited for once.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    named = [(name, own_part(t)) for name, t in named]
    kinds = [(name, t) for name, t in named if t.is_floating_point() or t.is_complex()]
    found = {name: _largest(t) for name, t in kinds if t.numel() and _is_dense(t)}
    if not found:
        return []
    values = dict(zip(found, _read(list(found.values())), strict=True))
    trained = {name for name, _ in model.named_parameters()}
    return [n for n, v in values.items() if math.isnan(v) or (n in trained and math.isinf(v))]


def _largest(tensor: Tensor) -> Tensor:
    """How large absolute values are, as float64 on its device; NaN wins."""
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if plain.element_size() == 1:  # float8, with which nothing can be computed
        plain = plain.float()
    least, most = torch.aminmax(plain)
    return least.double().abs() + most.double().abs()


def _read(numbers: Sequence[Tensor]) -> list[Any]:
    """Returns 0-dim tensors as numbers; each device is waited for once."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for one in numbers:
        by_device.setdefault(one.device, []).append(one)
    read = {device: iter(torch.stack(ones).tolist()) for device, ones in by_device.items()}
    return [next(read[one.device]) for one in numbers]


def shapes_of(model: nn.Module) -> list[tuple[str, list[int], str]]:
    """Returns name, shape and dtype of each parameter and buffer."""
    return [(name, list(t.shape), str(t.dtype)) for name, t in tensors_of_state(model).items()]


def tensors_of_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns a model's state, without what a ``get_extra_state`` returns that is no tensor."""
    return {name: t for name, t in named_state(model).items() if isinstance(t, Tensor)}


def check_same_model(model: nn.Module, comm: Comm) -> None:
    """Raises RankMismatch where the ranks have different models. Ranks: all, communicates."""
    check_same_lines("the ranks have different models", _lines_of(model), comm)


def _lines_of(model: nn.Module) -> list[str]:
    """Returns what the ranks' models must have in common before any number is compared."""
    frozen = [name for name, p in named_parameters(model) if not p.requires_grad]
    lines = [f"{name} {shape} {dtype}" for name, shape, dtype in shapes_of(model)]
    return lines + [f"{name} (frozen)" for name in frozen]


def are_equal(model: nn.Module, comm: Comm) -> bool:
    """Says whether all ranks' models are equal, bit by bit, with all buffers; but what is sharded.

    Ranks: all, communicates once.
    """
    whole = {name: t for name, t in tensors_of_state(model).items() if not is_sharded(t)}
    held = digests(as_dense(name, t) for name, t in whole.items())
    lines = int(digest_of(_lines_of(model)), 16)
    mine = hash((lines, _digest_of_buffers(model), *held))
    everyones = comm.all_gather("model", torch.tensor(mine))
    return not bool((everyones != everyones[0]).any())


def give_rank_0s(tensors: Mapping[str, Tensor], world: World) -> bool:
    """Gives all ranks rank 0's tensors; says if any differed here. Ranks: all, communicates."""
    if world.size == 1:
        return False
    mine = hash(tuple(digests(as_dense(name, tensor) for name, tensor in tensors.items())))
    everyones = world.comm.all_gather("digest of tensors", torch.tensor(mine))
    differed = False
    with torch.no_grad():
        for name, tensor in tensors.items() if bool((everyones != everyones[0]).any()) else ():
            content = as_bytes(name, tensor)  # not every dtype can be sent, or compared
            sent = content.clone()
            world.gradients.broadcast(sent)
            if not torch.equal(sent, content):
                differed = True
                tensor.copy_(sent.view(tensor.dtype).view(tensor.shape))
    return differed
