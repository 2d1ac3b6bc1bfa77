"""The process groups of this process, and what it needs for them: files, cores, a backend.

Ranks: all; what opens a group communicates, the rest is local.
"""

import os
import resource
from contextlib import nullcontext, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from dtrain.distributed.gloo_threads import yielding_threads
from dtrain.distributed.transport import GroupTransport


def allow_files(size: int) -> None:
    """Raises how many files this process may have open, as far as it may itself.

    Each gloo group is a connection to every other rank, and there are up to three; the limit that
    most systems begin with, 1024, would end that at some 340 ranks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * size + 1024
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # it may be enough as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def share_cores() -> None:
    """Gives torch this rank's part of the host's cores, unless it was told how many."""
    if not os.environ.get("OMP_NUM_THREADS"):
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        threads = max(1, (os.cpu_count() or 1) // ranks_here)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def has_gpu() -> bool:
    """There is one, and ``accelerate launch --cpu`` did not say to leave it alone."""
    told_not_to = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return torch.cuda.is_available() and not told_not_to


def open_default(timeout: timedelta, life: int) -> None:
    """Opens torch's default group from the variables of a launcher.

    A store that lives on still has the addresses of groups that were closed: ``life`` counts them.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    with nullcontext() if has_gpu() else yielding_threads():  # NCCL's stay as they are
        dist.init_process_group(
            "nccl" if has_gpu() else "gloo",
            timeout=timeout,
            store=PrefixStore(f"life-{life}", store),
            rank=rank,
            world_size=size,
        )


def open_gloo(timeout: timedelta) -> GroupTransport:
    """Opens one more group of all ranks, over which tensors on the CPU travel."""
    with yielding_threads():
        return GroupTransport(dist.new_group(backend="gloo", timeout=timeout))
