"""How fast nodes are before the first step: what they compute, and what moves between them.

Each rank multiplies matrices on its device. Then nodes move data in pairs, of which no two share a
node, in several rounds: a node is slow where all of its pairs are, and a link where only that pair
is. What ranks tell one another goes by way of the rendezvous store, which outlives a bad network.
"""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from select import select
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dtrain.distributed.environment import has_gpu, share_cores
from dtrain.distributed.health_verdict import Health, judge, pairings
from dtrain.distributed.launchers import find_launcher
from dtrain.distributed.rendezvous import find_store, read_all
from dtrain.distributed.transport import yielding_threads
from dtrain.errors import ConfigError, LaunchError

_SWITCH = "DTRAIN_HEALTH"
_SIDE = {"cpu": 1024, "cuda": 4096}  # of the matrices: 20 ms on a core, and less than 20 on a GPU
_WARM_S, _MULTIPLY_S = 0.2, 0.3
_MB = 1 << 20
_PIECES = (_MB // 16, _MB, *[16 * _MB] * 4)  # 64 MB, once the connection is there
_LONG_S = 0.25  # after a piece that took longer, no other follows
_SLOT_S = 5.0  # a pair has so long in its round, should one of it or of the round before be stuck
_MET_S = 60.0  # ranks that have opened their groups are all there
_COME_S = 15.0  # a device may have to be woken first
_LOOK_S = 0.05
_ADVICE = (
    "in each step all ranks wait for the slowest. `dtrain submit --spares 1` leaves such a node "
    "out; to look again: `dtrain health`; not to look: dtrain.init(health=False), DTRAIN_HEALTH=off"
)


def node_name() -> str:
    """Returns what the scheduler calls this node, or its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def wanted(asked: bool) -> bool:
    """Says whether to look, which the script or DTRAIN_HEALTH=off can do without."""
    text = os.environ.get(_SWITCH, "on")
    if text not in ("on", "off"):
        raise ConfigError(f"{_SWITCH}={text!r}: must be on or off")
    return asked and text == "on"


def examine(
    store: Store,
    rank: int,
    size: int,
    *,
    devices: Sequence[torch.device],
    backend: Literal["gloo", "nccl"],
    look: bool = True,
    come_s: float = 600.0,
) -> Health | None:
    """Measures, and judges on rank 0; None there if there is one node, or a rank does not ``look``.

    Ranks that do not come within ``come_s`` are silent. Ranks: all, communicates by the store.
    """
    store = PrefixStore("health", store)
    store.set(f"name/{rank}", json.dumps([node_name(), look]))
    here: dict[int, str] = {}
    if rank == 0:
        told = _collect(store, "name", range(size), come_s)
        here = {one: name for one, (name, _) in told.items()}
        nodes = [] if not all(wants for _, wants in told.values()) else list(here.values())
        leaders = {name: one for one, name in reversed(here.items())}  # each one's first rank
        names = list(dict.fromkeys(nodes))
        several = len(names) > 1 or len(here) < size
        store.set("plan", json.dumps([leaders[name] for name in names if several]))
    store.wait(["plan"], timedelta(seconds=2 * come_s))
    leaders_of: list[int] = json.loads(store.get("plan"))
    if not leaders_of:
        return None
    rounds = pairings(len(leaders_of))
    began = time.monotonic()
    gflops = min(multiply(device) for device in devices)
    links: list[tuple[int, int, float]] = []
    if rank in leaders_of:
        links = _links(store, leaders_of.index(rank), rounds, devices[0], backend, began)
    store.set(f"report/{rank}", json.dumps([gflops, links]))
    if rank != 0:
        return None
    left_s = began + _COME_S + _SLOT_S * (len(rounds) + 1) - time.monotonic()
    reports = _collect(store, "report", here, max(1.0, left_s))
    return _sum_up(size, here, reports)


def look_over(
    connect: Callable[[], Store] | None,
    rank: int,
    size: int,
    *,
    device: torch.device,
    backend: str,
    look: bool,
) -> list[Store]:
    """Warns, on rank 0, of nodes that are slow; returns connections that may be used again.

    Ranks: all, communicates; where there are several nodes.
    """
    if connect is None or os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        return []
    store, on_gpu = connect(), device.type == "cuda" and "nccl" in backend
    try:
        health = examine(
            store,
            rank,
            size,
            devices=[device],
            backend="nccl" if on_gpu else "gloo",
            look=look,
            come_s=_MET_S,
        )
    except RuntimeError as lost:
        raise LaunchError(f"before the first step, rank 0 said no more: {lost}") from lost
    if health is not None and health.findings:
        sys.stderr.write("".join(f"dtrain: {words}\n" for words in [*health.findings, _ADVICE]))
    return [store]


def examine_job(within_s: float) -> tuple[int, Health | None]:
    """Returns this rank, and on rank 0 what all that come ``within_s`` were found to be.

    No process group is opened, so ranks that do not come are told. Ranks: all, communicates.
    """
    launcher, variables = find_launcher(os.environ)
    os.environ.update(variables)
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if launcher == "solo" or size == 1:
        raise LaunchError(
            "this compares nodes: start it on each of them, as `srun --ntasks-per-node=1 dtrain "
            "health` or `torchrun --nnodes=2 ... -m dtrain health`"
        )
    share_cores(int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    rank, host, port = int(os.environ["RANK"]), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=within_s)
    try:  # rank 0 outlives what the others ask of it
        if not serves:
            find_store(None, [int(port)], within_s)
        store: Store = TCPStore(host, int(port), None, serves, timeout, wait_for_workers=False)
    except RuntimeError as error:
        what = "cannot serve" if serves else f"has met no rank 0 in {within_s:g} s"
        raise LaunchError(f"rank {rank} {what} at {host}:{port}: {error}") from error
    devices = [torch.device("cpu")]
    if has_gpu():
        devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if len(devices) > 1 and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        devices = [devices[int(os.environ["LOCAL_RANK"]) % len(devices)]]
    backend: Literal["gloo", "nccl"] = "nccl" if has_gpu() else "gloo"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives it
    store = PrefixStore(f"dtrain-health/{attempt}", store)
    return rank, examine(store, rank, size, devices=devices, backend=backend, come_s=within_s)


def _sum_up(size: int, here: Mapping[int, str], reports: Mapping[int, Any]) -> Health:
    names = list(dict.fromkeys(here.values()))
    gflops: list[dict[int, float]] = [{} for _ in names]
    links: dict[tuple[int, int], float] = {}
    silent: dict[int, list[int]] = {}
    for rank, name in here.items():
        if rank not in reports:
            silent.setdefault(names.index(name), []).append(rank)
            continue
        gflops[names.index(name)][rank] = reports[rank][0]
        for one, other, mb_s in reports[rank][1]:
            links[one, other] = min(mb_s, links.get((one, other), mb_s))
    for rank in range(size):
        if rank not in here:
            silent[len(names)] = [rank]
            names.append(_name_of(rank, size))
            gflops.append({})
    return judge(names, gflops, links, silent)


def _name_of(rank: int, size: int) -> str:
    """Names the node of a rank that never came: SLURM's list has it, with a task for each."""
    nodes = _expanded(os.environ.get("SLURM_STEP_NODELIST", ""))
    return nodes[rank] if len(nodes) == size else f"of rank {rank}"


def _expanded(nodelist: str) -> list[str]:
    """Returns the names in one of SLURM's lists: ``gpu[03-05,9],x1`` has five."""
    names = []
    for entry in re.findall(r"(?:[^\[,]|\[[^\]]*\])+", nodelist):
        found = [""]
        for plain, numbers in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", entry):
            ends: list[str] = [plain] if plain else []
            for span in numbers.split(",") if numbers else []:
                first, _, last = span.partition("-")
                width = len(first)
                ends += [f"{n:0{width}}" for n in range(int(first), int(last or first) + 1)]
            found = [start + end for start in found for end in ends]
        names += found
    return names


def _collect(store: Store, what: str, ranks: Any, within_s: float) -> dict[int, Any]:
    """Returns what ranks have told, once all have, or the time is over. Ranks: rank 0 only."""
    keys = {rank: f"{what}/{rank}" for rank in ranks}
    if not _come(store, list(keys.values()), within_s):
        keys = {rank: key for rank, key in keys.items() if store.check([key])}
    told = read_all(store, list(keys.values()))
    return {rank: json.loads(text) for rank, text in zip(keys, told, strict=True)}


def _come(store: Store, keys: list[str], within_s: float) -> bool:
    """Waits for keys in short calls: torch tells of long ones that end in vain, on stderr."""
    # By select: Python's locks wait for a time on a clock, which libfaketime shifts.
    until = time.monotonic() + within_s
    while not (there := store.check(keys)) and time.monotonic() < until:
        select([], [], [], _LOOK_S)
    return there


def multiply(device: torch.device) -> float:
    """Returns how many GFLOP/s a device does, once it is warm.

    The product that a quarter is faster than counts: what disturbs it for a moment does not.
    """
    side = _SIDE.get(device.type, _SIDE["cuda"])
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    # No random numbers: the script's streams stay as they are.
    a = torch.full((side, side), 0.5, device=device, dtype=dtype)
    product, took = torch.empty_like(a), list[float]()
    began = time.monotonic()
    with torch.no_grad():
        while (now := time.monotonic()) < began + _WARM_S + _MULTIPLY_S or len(took) < 3:
            torch.mm(a, a, out=product)
            if device.type != "cpu":
                torch.cuda.synchronize(device)
            if now >= began + _WARM_S:
                took.append(time.monotonic() - now)
    return 2e-9 * side**3 / sorted(took)[len(took) // 4]


def _links(
    store: Store,
    me: int,
    rounds: Sequence[Sequence[tuple[int, int]]],
    device: torch.device,
    backend: Literal["gloo", "nccl"],
    began: float,
) -> list[tuple[int, int, float]]:
    """Returns MB/s of each pair that this node is in. Ranks: the first of each node."""
    found = []
    for number, pairs in enumerate(rounds):
        for one, other in pairs:
            if me not in (one, other):
                continue
            apart, moved = PrefixStore(f"{number}/{one}", store), list[float]()
            # By the clock, so that a pair that is stuck holds up none of the next round.
            patience_s = began + _COME_S + _SLOT_S * number - time.monotonic()
            apart.set(f"came/{me}", "")
            if _come(apart, [f"came/{other if me == one else one}"], patience_s):
                # In a thread: nothing bounds the time in which NCCL connects.
                arguments = apart, int(me == other), device, backend, moved
                moving = threading.Thread(target=_move, args=arguments, daemon=True)
                moving.start()
                moving.join(2 * _SLOT_S)
            mb_s = moved[0] if moved else 0.0
            found.append((one, other, mb_s))
    return found


def _move(
    store: Store,
    place: int,
    device: torch.device,
    backend: Literal["gloo", "nccl"],
    moved: list[float],
) -> None:
    with suppress(RuntimeError):  # nothing arrived in time, or the connection broke
        moved.append(exchange(store, place, device, backend))


def exchange(
    store: Store, place: int, device: torch.device, backend: Literal["gloo", "nccl"]
) -> float:
    """Returns MB/s that move each way between the two that call it, ``place`` 0 and 1.

    In a group of its own, over the transport of gradients: one that is stuck harms no other.
    """
    timeout = timedelta(seconds=_SLOT_S)
    group: Any
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = dist.ProcessGroupNCCL(store, place, 2, options)
    else:
        device = torch.device("cpu")
        with yielding_threads():
            group = dist.ProcessGroupGloo(store, place, 2, timeout)
    mine = torch.zeros(max(_PIECES) // 4, device=device)
    both = [torch.zeros_like(mine), torch.zeros_like(mine)]

    def swap(length: int) -> None:
        parts = [part[:length] for part in both]
        group.allgather([parts], [mine[:length]]).wait(timeout)

    rates: dict[int, list[float]] = {}
    took = 0.0
    for size in _PIECES:
        # Of the two, one decides; and so both begin the next piece together.
        mine[0] = float(place == 0 and took > _LONG_S and len(rates) > 1)
        swap(1)
        if both[0][0].item():
            break
        began = time.monotonic()
        swap(size // mine.element_size())
        took = time.monotonic() - began
        rates.setdefault(size, []).append(size / took / 1e6)
    return median(rates[max(rates)])
