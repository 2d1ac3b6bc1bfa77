"""Which card each rank is to use: not the one of another rank."""

import os
from collections.abc import Sequence

import torch

from dtrain.distributed.meeting import Arrival
from dtrain.errors import LaunchError

#: What says which cards a process sees.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def own_card(local_rank: int) -> tuple[str, str]:
    """Returns the name of the card that this rank is to use, and what it sees.

    Of as many cards as there are ranks on the host, a rank's own is that of its number; otherwise
    how many it sees does not tell: each task may be given its own, which it sees as 0.
    """
    seen, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE") or 0)
    if 0 < ranks <= seen:
        return "", ""
    visible = ", ".join(f"{name}={os.environ[name]}" for name in _VISIBLE if name in os.environ)
    card = str(torch.cuda.get_device_properties(local_rank % seen).uuid)
    return card, f"torch.cuda.device_count()={seen}, with {visible or 'all cards visible'}"


def check_cards(arrivals: Sequence[Arrival]) -> None:
    """Raises LaunchError where two ranks of a host are to use the same card."""
    users: dict[tuple[str, str], list[Arrival]] = {}
    for one in arrivals:
        if one.card:
            users.setdefault((one.host, one.card), []).append(one)
    crowded = [several for several in users.values() if len(several) > 1]
    if not crowded:
        return
    host, last = crowded[0][0].host, crowded[0][-1]
    ranks = sum(one.host == host for one in arrivals)
    cards = sum(of == host for of, _ in users)
    raise LaunchError(
        f"{ranks} ranks run on {host}, on {cards} card{'s' * (cards > 1)}: ranks "
        f"{' and '.join(str(one.rank) for one in crowded[0])} have the same one, and NCCL takes "
        f"one rank for each (rank {last.rank} sees {last.sees}). Start as many ranks as there are "
        f"cards (`torchrun --nproc-per-node={cards}`), or give each its own "
        "(`srun --gpus-per-task=1`); or compute on the CPU: ACCELERATE_USE_CPU=true. To try "
        "several ranks on one card, open the group first: "
        'torch.distributed.init_process_group("gloo").'
    )
