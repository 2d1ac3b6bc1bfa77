"""Whether all ranks share out the same samples in the same order: compared by some numbers."""

from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.utils.data import Subset

from dtrain.data.counting import tensors_of
from dtrain.distributed import Comm
from dtrain.errors import RankMismatch

# How many positions of an epoch are looked at, rows that are read, and numbers of each tensor.
POSITIONS, ROWS_READ, _NUMBERS = 1024, 4, 4096
# Machines may round differently where each has computed its data; other data differ by far more.
_ROUNDING = 1e-4


def rows_within(dataset: Any, rows: list[Any]) -> tuple[Any, list[Any]]:
    """Returns what a Subset is of, and the rows there, which may be keys; of all else the same."""
    while type(dataset) is Subset:
        rows = [*map(dataset.indices.__getitem__, rows)]
        dataset = dataset.dataset
    return dataset, rows


def check_alike(comm: Comm, where: str, sizes: tuple[int, int], rows: list[Any], read: Any) -> None:
    """Raises RankMismatch where ranks differ in ``rows``, or in what is ``read`` of the first.

    Or in ``sizes``: the samples, and the batch.
    Ranks: all, communicates.
    """
    digest = crc32("\n".join(map(str, rows)).encode())
    mine = [*sizes, digest, *figure_of(read)]
    gathered = comm.all_gather(f"samples of {where}", torch.tensor(mine, dtype=torch.float64))
    everyones = [one.tolist() for one in gathered]
    numbers = [(int(one[0]), int(one[1])) for one in everyones]
    if len({*numbers}) > 1:
        told = (
            f"{n} in batches of {size} on rank {rank}" for rank, (n, size) in enumerate(numbers)
        )
        raise RankMismatch(
            f"ranks have other numbers of samples in {where}: {', '.join(told)}. Change a dataset "
            "or its order alike on all of them."
        )
    remedy = (
        "Batches are shared out among ranks, so some samples would come several times and others "
        "never. Give all ranks the same whole dataset, and leave it to dtrain to share it out; "
        "seed what is drawn (a split, an order, the data), or call dtrain.init() before it. "
        "Samples of a rank's own come as an iterable of ready batches."
    )
    if len({one[2] for one in everyones}) > 1:
        raise RankMismatch(
            f"ranks have other samples in {where}, or another order of them, which begins here "
            f"with row {rows[0]}. {remedy}"
        )
    values, scales = [one[3] for one in everyones], [one[4] for one in everyones]
    scale = max(scales)
    if max(values) - min(values) > _ROUNDING * scale:
        raise RankMismatch(
            f"ranks have other samples in {where}: row {rows[0]} and those that follow hold "
            f"other numbers on rank {_odd_one(values)} than on rank 0. {remedy}"
        )


def _odd_one(values: list[float]) -> int:
    return max(range(len(values)), key=lambda rank: abs(values[rank] - values[0]))


def figure_of(read: Any) -> tuple[float, float]:
    """Returns a number that hardly any other data have, and how large it might be."""
    figure = scale = 0.0
    for tensor in tensors_of(read):
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            continue
        numbers = _some(tensor)
        weights = torch.cos(torch.arange(1, len(numbers) + 1, dtype=torch.float64))
        figure += float(weights @ numbers)
        scale += float(numbers.abs().sum())
    return figure, scale


def _some(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().reshape(-1)
    numbers = flat[:: max(1, len(flat) // _NUMBERS)].cpu().double()
    return numbers.nan_to_num(0.0, 0.0, 0.0)
