"""What keeps the replicas of a model equal."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dtrain.distributed.comm import Comm
from dtrain.distributed.exchange import digest_of
from dtrain.distributed.names import named_parameters, named_state
from dtrain.errors import RankMismatch


def share_buffers(model: nn.Module, comm: Comm) -> None:
    """Gives all ranks rank 0's buffers, such as BatchNorm's. Ranks: all, communicates."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for dtype, buffers in by_dtype.items():
        flat = torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
        flat = comm.broadcast(f"buffers of {dtype}", flat)
        for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.detach().copy_(values.view_as(buffer))


def shapes_of(model: nn.Module) -> list[tuple[str, list[int], str]]:
    """Returns name, shape and dtype of each parameter and buffer."""
    return [(name, list(t.shape), str(t.dtype)) for name, t in named_state(model).items()]


def check_same_model(model: nn.Module, comm: Comm) -> None:
    """Raises RankMismatch where the ranks have different models. Ranks: all, communicates."""
    shapes = shapes_of(model)
    frozen = [name for name, p in named_parameters(model) if not p.requires_grad]
    if len(set(comm.gather_objects("model", digest_of([*shapes, frozen])))) == 1:
        return
    mine = [f"{name} {shape} {dtype}" for name, shape, dtype in shapes]
    mine += [f"{name} (frozen)" for name in frozen]
    models = comm.gather_objects("models", mine)
    rows = []
    for rank, lines in enumerate(models):
        extra = [line for line in lines if line not in models[0]]
        lacking = [line for line in models[0] if line not in lines]
        words = [f"has {', '.join(extra[:5])}"] * bool(extra)
        words += [f"lacks {', '.join(lacking[:5])}"] * bool(lacking)
        rows.append(f"  rank {rank}: {'; '.join(words) or 'as rank 0'}")
    raise RankMismatch(
        "the ranks have different models (compared with rank 0):\n" + "\n".join(rows)
    )


def check_same_call(arguments: Mapping[str, object], comm: Comm) -> None:
    """Raises RankMismatch where ``fit`` has different arguments. Ranks: all, communicates."""
    everyones = comm.gather_objects("fit", {name: str(value) for name, value in arguments.items()})
    differing = [n for n in arguments if len({one.get(n) for one in everyones}) > 1]
    if differing:
        table = "\n".join(
            f"  rank {rank}: " + ", ".join(f"{name}: {one.get(name)}" for name in differing)
            for rank, one in enumerate(everyones)
        )
        raise RankMismatch(
            f"the ranks called fit with different arguments or data of different length:\n{table}"
        )
