"""Whether all ranks do the same: what they say of it is compared, and where it differs is told."""

from collections.abc import Mapping

import torch

from dtrain.distributed.comm import Comm
from dtrain.distributed.exchange import digest_of
from dtrain.errors import ConfigError, RankMismatch


def check_same_lines(what: str, mine: list[str], comm: Comm) -> None:
    """Raises RankMismatch where the ranks have different lines. Ranks: all, communicates."""
    if len(set(comm.gather_objects("digests", digest_of(mine)))) == 1:
        return
    everyones = comm.gather_objects("lines", mine)
    rows = []
    for rank, lines in enumerate(everyones):
        extra = [line for line in lines if line not in everyones[0]]
        lacking = [line for line in everyones[0] if line not in lines]
        words = [f"has {', '.join(extra[:5])}"] * bool(extra)
        words += [f"lacks {', '.join(lacking[:5])}"] * bool(lacking)
        rows.append(f"  rank {rank}: {'; '.join(words) or 'as rank 0'}")
    raise RankMismatch(f"{what} (compared with rank 0):\n" + "\n".join(rows))


def check_same_call(
    arguments: Mapping[str, object], comm: Comm, call: str = "fit", *, parted: bool = False
) -> None:
    """Raises RankMismatch where ``fit`` has different arguments.

    And ConfigError where a step failed on one rank only, which so has ``parted`` from the others.
    Ranks: all, communicates.
    """
    mine = {name: str(value) for name, value in arguments.items()}
    digest = int(digest_of([*mine.items()]), 16) >> 1
    told = comm.all_gather(call, torch.tensor([digest, parted]))
    if bool(told[:, 1].any()):
        raise ConfigError(
            "a callback or the optimizer failed on one rank in the fit before: the ranks may "
            "differ: make a new Trainer, with a new optimizer, or start the run again"
        )
    if not bool((told != told[0]).any()):
        return
    everyones = comm.gather_objects(f"{call}, by name", mine)
    differing = [n for n in arguments if len({one.get(n) for one in everyones}) > 1]
    if differing:
        table = "\n".join(
            f"  rank {rank}: " + ", ".join(f"{name}: {one.get(name)}" for name in differing)
            for rank, one in enumerate(everyones)
        )
        raise RankMismatch(
            f"the ranks called {call} with different arguments or data of different length:\n"
            + table
        )
