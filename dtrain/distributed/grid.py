"""All ranks as a grid: those of a row hold a model among themselves, and each row holds it all.

Those of a column hold the same parts, one in each row: they are copies of one another.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from dtrain.distributed.transport import yielding_threads
from dtrain.errors import ConfigError

#: How many rows there are: so many, or one for each host.
Rows = int | str | None
#: The ranks of each row.
Grid = tuple[tuple[int, ...], ...]


class Groups(NamedTuple):
    """This rank's process groups."""

    row: dist.ProcessGroup
    column: dist.ProcessGroup | None  # None where there is one row


def hosts_of(places: Sequence[tuple[str, int]]) -> list[list[int]]:
    """Returns the ranks of each host, from each rank's host name and number on its host.

    Ranks of one name and one number are on different hosts that have the same name.
    """
    hosts: list[tuple[str, dict[int, int]]] = []
    for rank, (name, number) in enumerate(places):
        known = [ranks for host, ranks in hosts if host == name and number not in ranks]
        if not known:
            known.append({})
            hosts.append((name, known[0]))
        known[0][number] = rank
    return [[*ranks.values()] for _, ranks in hosts]


def grid_of(rows: Rows, hosts: Sequence[Sequence[int]]) -> Grid:
    """Returns the grid; neighbours on a host are neighbours in a row.

    Raises ConfigError where rows would have different lengths, or one rank each.
    """
    ordered = [rank for host in hosts for rank in host]
    size = len(ordered)
    if rows == "hosts":
        counts = [len(host) for host in hosts]
        if len({*counts}) > 1:
            raise ConfigError(
                f"FSDP(replicas='hosts'): the hosts have {', '.join(map(str, counts))} ranks, and "
                "each replica needs as many: start as many on each host, or leave replicas out"
            )
        rows = len(hosts)
    number = int(rows or 1)
    if size % number:
        fit = [n for n in range(2, size // 2 + 1) if size % n == 0]
        raise ConfigError(
            f"FSDP(replicas={number}): {size} ranks cannot be divided into {number} replicas of as "
            f"many ranks; {f'into {some(fit)} they can' if fit else 'leave it out'}"
        )
    length = size // number
    if length == 1 < size:
        raise ConfigError(
            f"FSDP(replicas={rows!r}): with {number} replicas on {size} ranks each rank would hold "
            "the whole model, and nothing is sharded: use strategy='ddp', or fewer replicas"
        )
    return tuple(tuple(ordered[start : start + length]) for start in range(0, size, length))


def some(numbers: Sequence[int]) -> str:
    """Returns numbers in words."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def open_groups(grid: Grid, rank: int, timeout: timedelta) -> Groups:
    """Opens a process group for each row and each column. Ranks: all, communicates."""
    columns = [*zip(*grid, strict=True)]
    with yielding_threads():
        row, column = (_open(lines, rank, timeout) for lines in (grid, columns))
    return Groups(row, column)


def _open(lines: Sequence[Sequence[int]], rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """Returns the group of this rank's line. All ranks open all groups, in one order."""
    groups = [dist.new_group([*line], timeout=timeout) for line in lines]
    mine: dist.ProcessGroup = next(
        group for group, line in zip(groups, lines, strict=True) if rank in line
    )
    dist.barrier(mine)  # as in `open_gloo`
    return mine
