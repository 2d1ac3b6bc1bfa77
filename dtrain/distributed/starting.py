"""How a rank comes to its place: it meets all others in the store, before a group opens."""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from dtrain.distributed.cards import check_cards, own_card
from dtrain.distributed.environment import has_gpu
from dtrain.distributed.launchers import find_launcher
from dtrain.distributed.meeting import Arrival, meet
from dtrain.distributed.rendezvous import (
    Job,
    StoreProcess,
    find_address,
    find_store,
    ports_for,
    serve_apart,
)
from dtrain.errors import LaunchError


class Place(NamedTuple):
    """Which rank this is, of all and on its host; and what serves the store, if that is its own."""

    rank: int
    local_rank: int
    local_size: int
    store_process: StoreProcess | None


def come_together(
    launcher: str,
    variables: dict[str, str],
    size: int,
    connect: Callable[[], Store],
    timeout_s: float,
    *,
    opens: bool,
) -> Place:
    """Returns once all ranks have met in the store, before a group opens; else LaunchError."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    store_process = None
    try:
        if opens:
            rank, said_by = int(os.environ["RANK"]), _said_by(variables, size)
            find_address(timeout_s)
            job = Job.of(os.environ, launcher, by_launcher="RANK" in variables)
            port = int(os.environ["MASTER_PORT"])
            # torchrun's is one that was free a moment before.
            chosen = before.get("MASTER_PORT", port) and "TORCHELASTIC_RUN_ID" not in os.environ
            ports = ports_for(port, job, chosen=bool(chosen))
            store_process = serve_apart(job, ports, timeout_s)
            if store_process is None:
                find_store(None, [port], timeout_s)
            else:
                store_process.wait()
        else:
            rank, said_by = dist.get_rank(), "its process group was opened by the script"
        given, on_host = os.environ.get("LOCAL_RANK"), os.environ.get("LOCAL_WORLD_SIZE")
        # Without its number, it cannot be said yet which card is its own.
        cards = own_card(int(given)) if opens and given and has_gpu() else ("", "")
        address = os.environ.get("MASTER_ADDR", "")
        mine = Arrival.of(rank, address, several_hosts=on_host != str(size), cards=cards)
        afresh = store_process is not None
        found = meet(connect(), mine, size, said_by, timeout_s, check_cards, afresh=afresh)
    except LaunchError:
        if store_process is not None:
            store_process.drop()
        for name, value in before.items():  # as it was: the script may try again
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
        raise
    local_rank, local_size = int(given or found[0]), int(on_host or found[1])
    if opens:
        found_out = {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(local_size)}
        os.environ.update({n: one for n, one in found_out.items() if not os.environ.get(n)})
        # As they are now: another port may have been found, or another name for this host.
        variables |= {name: os.environ[name] for name in (*variables, *found_out)}
    return Place(rank, local_rank, local_size, store_process)


def around_open_group() -> tuple[str, dict[str, str]]:
    """Returns what launched a process whose script has opened its group, if that can be known.

    Where the launcher's variables describe another world, or none, the group is what counts.
    """
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    try:
        launcher, variables = find_launcher(os.environ)
    except LaunchError:  # half an environment: the group is whole
        return "script", {}
    told = os.environ | variables
    if (told.get("RANK"), told.get("WORLD_SIZE")) == (rank, size):
        return launcher, variables
    if size == "1" and launcher != "solo":
        raise LaunchError(
            f"the script has opened a process group of one rank, but {launcher} started "
            f"{told['WORLD_SIZE']}: open it on all of them, or leave it to dtrain.init"
        )
    return "solo" if size == "1" else "script", {}


def _said_by(variables: dict[str, str], size: int) -> str:
    """Names the variable that says how many ranks there are."""
    names = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
    found = [name for name in names if os.environ.get(name) == str(size)]
    return f"{found[0] if found and 'WORLD_SIZE' in variables else 'WORLD_SIZE'}={size}"
