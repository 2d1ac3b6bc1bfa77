"""What of the host is this rank's own: its cores, its files, and whether it has a GPU."""

import os
import resource
from contextlib import suppress

import torch


def allow_files(size: int) -> None:
    """Raises how many files this process may have open, as far as it may itself."""
    # Each of up to three gloo groups is a connection to every other rank; the usual limit is 1024.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * size + 1024
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # it may be enough as it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def share_cores(ranks: int) -> None:
    """Gives torch a part of the host's cores, on which so many ranks run, unless it was told."""
    if not os.environ.get("OMP_NUM_THREADS"):
        threads = max(1, (os.cpu_count() or 1) // ranks)
        threads = min(threads, len(os.sched_getaffinity(0)))  # mpirun may bind a rank to one core
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def has_gpu() -> bool:
    """There is one, and ``accelerate launch --cpu`` did not say to leave it alone."""
    told_not_to = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return torch.cuda.is_available() and not told_not_to
