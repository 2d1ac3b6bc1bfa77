"""Tensors of which each rank holds some rows only, as FSDP's parameters: DTensors of torch's."""

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Says whether this rank holds a part of a tensor only."""
    # Importing it takes half a second; nobody has made one before somebody did.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """Returns what this rank holds of a tensor, which may have no rows: itself, if all of it."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def copies_of(tensor: Tensor) -> int:
    """Returns how many ranks hold the part of a tensor that this one does; of processes."""
    ranks = dist.get_world_size()
    if not is_sharded(tensor):
        return ranks
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    sizes = [mesh.size(dim) for dim, kind in enumerate(placements) if not kind.is_replicate()]
    return int(ranks // math.prod(sizes))


def version_of(tensor: Tensor) -> int:
    """Returns a count of what was written into a tensor in place, or into this rank's rows."""
    return tensor._version + (own_part(tensor)._version if is_sharded(tensor) else 0)


def unsharded(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns those of the tensors that each rank holds whole."""
    return [tensor for tensor in tensors if not is_sharded(tensor)]


def own_place(tensor: Tensor) -> tuple[slice, ...] | None:
    """Returns where in a tensor lies what this rank holds of it; None where that is in pieces."""
    if not is_sharded(tensor):
        return ()
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if not all(type(one) is Shard or one.is_replicate() for one in placements):
        return None  # as tensor parallel may lay them out
    size, begin = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    return tuple(slice(n, n + count) for n, count in zip(begin, size, strict=True))


def placed_like(whole: Tensor, like: Tensor) -> Tensor:
    """Returns of a whole tensor, equal on all ranks, what this rank is to hold; copied.

    That is all of it, itself, where ``like`` is not sharded, or has another shape. Of a file, no
    more is read.
    """
    if not is_sharded(like) or is_sharded(whole) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    if (at := own_place(like)) is None:
        mine = distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)
        return mine.clone()  # its rows would keep all others in memory
    part = whole[at].to(like.device, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def fill_own_part(tensor: Tensor, part_of: Callable[[tuple[slice, ...]], Tensor]) -> None:
    """Writes into what this rank holds of a tensor what ``part_of`` returns for its place in it."""
    own = own_part(tensor)
    if (at := own_place(tensor)) is None:
        own.copy_(own_part(placed_like(part_of(()), tensor)))
    elif own.numel():
        own.copy_(part_of(at))


def whole(tensor: Tensor) -> Tensor:
    """Returns all of a tensor, on each rank; itself, if it is not sharded.

    Ranks: all, communicates.
    """
    if not is_sharded(tensor):
        return tensor
    held: Any = tensor.detach()
    if held.device_mesh.ndim > 1:  # rows first, then slices: at once, torch warns of the order
        from torch.distributed.tensor import Replicate

        held = held.redistribute(placements=[Replicate(), *held.placements[1:]])
    every: Tensor = held.full_tensor()
    return every


@torch.no_grad()
def gathered(tensor: Tensor, owner: int) -> Tensor | None:
    """Returns a sharded tensor, whole and on the host, on the rank ``owner``; None on the others.

    Ranks: all, communicates; all at once, over what gradients travel over. Of several replicas of
    a model, only those of the owner's do.
    """
    if tensor.device_mesh.ndim > 1:  # type: ignore[attr-defined]
        every = whole(tensor).cpu()
        return every if dist.get_rank() == owner else None
    group = tensor.device_mesh.get_group()  # type: ignore[attr-defined]
    if owner not in dist.get_process_group_ranks(group):
        return None
    rank, size = dist.get_rank(), dist.get_world_size(group)
    rows = -(-tensor.shape[0] // size)  # of each rank but the last ones, which may have fewer
    part = own_part(tensor).detach().contiguous()
    if part.shape[0] < rows:
        part = torch.cat([part, part.new_zeros(rows - part.shape[0], *part.shape[1:])])
    parts = [torch.empty_like(part) for _ in range(size)] if rank == owner else None
    dist.gather(part, parts, dst=owner, group=group)
    return None if parts is None else torch.cat(parts)[: tensor.shape[0]].cpu()
