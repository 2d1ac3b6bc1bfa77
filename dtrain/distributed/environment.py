"""What of the host is this rank's own: cores, cards, files, and its number there."""

import json
import os
import resource
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dtrain.distributed.launchers import find_launcher
from dtrain.distributed.processes import this_machine
from dtrain.errors import LaunchError

#: What says which cards a process sees.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_AT_ONCE = 256  # keys that rank 0 reads in one call
_CARDS_S = 30.0  # how long ranks of a host wait for one another to compare their cards


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


def share_cores() -> None:
    """Gives torch this rank's part of the host's cores, unless it was told how many."""
    if not os.environ.get("OMP_NUM_THREADS"):
        threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
        threads = min(threads, len(os.sched_getaffinity(0)))  # mpirun may bind a rank to one core
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def of_open_group(env: Mapping[str, str]) -> tuple[str, dict[str, str]] | None:
    """Who launched this rank of a group that the script has opened; None where it has not.

    Where the launcher's variables describe another world, or none, the group is what counts.
    """
    if not dist.is_initialized():
        return None
    rank, size, variables = dist.get_rank(), dist.get_world_size(), dict[str, str]()
    try:
        launcher, variables = find_launcher(env)
        told = dict(env) | variables
    except LaunchError:
        launcher, told = "solo", {}
    if (told.get("RANK"), told.get("WORLD_SIZE")) != (str(rank), str(size)):
        if size == 1 and launcher == "solo":
            return None
        if size == 1:
            raise LaunchError(
                f"the script has opened a process group of one rank, but {launcher} started "
                f"{told['WORLD_SIZE']}: open it on all of them, or leave it to dtrain.init"
            )
        # A LOCAL_RANK that is set is that of the other world.
        launcher, variables = "script", {"LOCAL_RANK": ""}
        variables |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    elif env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return launcher, variables
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        raise LaunchError(
            f"the script has opened a process group over a {type(store).__name__}, which dtrain's "
            'own messages cannot use: open it with init_method="tcp://HOST:PORT" or "env://", or '
            "leave it to dtrain.init"
        )
    return launcher, variables | {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port)}


def find_place(rank: int, size: int, host: str, store: Store) -> dict[str, str]:
    """Returns LOCAL_RANK and LOCAL_WORLD_SIZE, for launchers that do not say.

    Raises LaunchError where not all come. Ranks: all, communicates.
    """
    store.set(f"place/{rank}", f"{host} {this_machine()}")
    keys: list[str] = []
    try:
        if rank == 0:
            told: list[bytes] = []
            for first in range(0, size, _AT_ONCE):
                keys = [f"place/{one}" for one in range(first, min(first + _AT_ONCE, size))]
                store.wait(keys)
                told += store.multi_get(keys)
            here: Counter[bytes] = Counter()
            places = [(here.update([one]), here[one] - 1)[1] for one in told]
            counted = [(place, here[one]) for place, one in zip(places, told, strict=True)]
            store.set("places", json.dumps(counted))
        local_rank, local_size = json.loads(store.get("places"))[rank]
    except RuntimeError:
        late = [key.removeprefix("place/") for key in keys if not store.check([key])]
        who = f"rank {', '.join(late)}" if late else "rank 0, which waits for others"
        raise LaunchError(f"rank {rank} of {size} has waited in vain for {who}") from None
    return {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(local_size)}


def has_gpu() -> bool:
    """There is one, and ``accelerate launch --cpu`` did not say to leave it alone."""
    told_not_to = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return torch.cuda.is_available() and not told_not_to


def check_cards(env: Mapping[str, str], host: str, store: Store) -> None:
    """Raises LaunchError on all ranks of this host where two of them are to use the same card.

    How many a rank sees does not tell: each task of a job may be given its own, which it sees as 0.
    """
    given = "LOCAL_WORLD_SIZE" if env.get("LOCAL_WORLD_SIZE") else "LOCAL_RANK"
    ranks = int(env[given]) + (given == "LOCAL_RANK")
    seen, local = torch.cuda.device_count(), int(env["LOCAL_RANK"])
    if ranks <= seen:
        return  # the card of a rank's number is its own
    card = str(torch.cuda.get_device_properties(local % seen).uuid)
    came, told = store.add(f"cards/{host}", 1), json.dumps([card, int(env["RANK"])])
    store.set(f"cards/{host}/{came}", told)
    places = [f"cards/{host}/{place}" for place in range(1, ranks + 1)]
    try:
        store.wait(places, timedelta(seconds=_CARDS_S))
    except RuntimeError:
        return  # not all have come; who waits for them next says so
    by_card: dict[str, list[int]] = {}
    for answer in store.multi_get(places):
        one, rank = json.loads(answer)
        by_card.setdefault(one, []).append(rank)
    if crowded := sorted(sorted(users) for users in by_card.values() if len(users) > 1):
        visible = _show(env, [name for name in _VISIBLE if name in env]) or "all cards visible"
        raise LaunchError(
            f"{ranks} ranks run on {host} ({given}={env[given]}), on {len(by_card)} "
            f"card{'s' * (len(by_card) > 1)}: ranks {' and '.join(map(str, crowded[0]))} have the "
            f"same one, and NCCL takes one rank for each (rank {env['RANK']} sees "
            f"torch.cuda.device_count()={seen}, with {visible}). "
            "Start as many ranks as there are cards (`torchrun --nproc-per-node="
            f"{len(by_card)}`), or give each its own (`srun --gpus-per-task=1`); or compute on the "
            "CPU: ACCELERATE_USE_CPU=true. To try several ranks on one card, open the group first: "
            'torch.distributed.init_process_group("gloo").'
        )


def _show(env: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{name}={env[name]}" for name in names)
