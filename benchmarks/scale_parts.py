"""What the parts of dtrain cost alone, one rank's end of them, in a world that is simulated.

benchmarks/scale.py calls it and shows it. Nothing here needs more than two processes: what a rank
does by itself is done by one, what W ranks would send is filled in, and the rendezvous store is a
real one. All times are processor time, of the rank or of the store.
"""

from __future__ import annotations

import hashlib
import pickle
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import PrefixStore, Store, TCPStore

from dtrain.checkpoint import format as files
from dtrain.checkpoint import writer as writing
from dtrain.data.order import Shuffled
from dtrain.data.shares import Shares
from dtrain.distributed import store_process
from dtrain.distributed.activity import Heartbeat, heartbeat_key
from dtrain.distributed.comm import Comm
from dtrain.step.lane import Lane, Slot
from dtrain.strategies import DDP
from dtrain.watchdog.judgement import LOOKERS, Seen, judge
from dtrain.watchdog.store import Others
from dtrain.watchdog.straggler import SECONDS, STEPS, StragglerClock

PARAMETERS = 291  # tensors of a model of 7 billion parameters, as Llama 2 has them


def seconds_of(call: Callable[[], object], least_s: float = 0.05) -> float:
    """Returns the processor time that a median call takes; others may keep the machine busy."""
    call()
    took: list[float] = []
    until = time.perf_counter() + least_s
    while len(took) < 3 or (time.perf_counter() < until and len(took) < 2000):
        began = time.thread_time()
        call()
        took.append(time.thread_time() - began)
    return statistics.median(took)


def everything(ranks: int) -> dict[str, float]:
    """Returns the figures of all parts at a world size."""
    found: dict[str, float] = {}
    for part in (order, lane, comm, agreements, checkpoint, heartbeats):
        found |= part(ranks)
    return found


# -- data ---------------------------------------------------------------------------------------


def order(ranks: int) -> dict[str, float]:
    """A rank's samples, beginning in the middle of an epoch of a billion."""
    samples, batch, steps = 10**9, 32 * ranks, 256
    shuffled = Shuffled(samples, seed=0)
    shares = Shares(shuffled, samples, batch, ranks - 1, ranks, lambda share: [share])
    middle = samples // batch // 2

    def begin() -> None:
        *_, rows = next(shares.rows(0, middle))
        assert len(rows) == 32

    def go_on() -> None:
        assert sum(1 for _ in islice(shares.rows(0, middle), steps)) == steps

    return {
        "order: to begin in the middle of an epoch (us)": 1e6 * seconds_of(begin),
        "order: a rank's share of a step (us)": 1e6 * seconds_of(go_on) / steps,
    }


# -- the lane -----------------------------------------------------------------------------------


def lane(ranks: int) -> dict[str, float]:
    """What travels, what reading it costs, and how far rounding moves counts."""
    ours = Lane(nn.Linear(1, 1), rank=0, size=ranks)
    said = torch.zeros(len(Slot))
    said[Slot.CANARY], said[Slot.WEIGHT], said[Slot.FED] = (2 * ranks - 1) / ranks, 1.0, 1.0
    # DDP multiplies by 1 / W in float32, and a ring adds one rank to the next. That is exact where
    # W is a power of two; so some ranks fewer.
    odd = ranks - 24
    share = np.float32(1) / np.float32(odd)
    ones = np.add.accumulate(np.full(odd, share, np.float32), dtype=np.float32)
    counts = np.rint(ones.astype(np.float64) * odd)
    wrong = np.abs(counts - np.arange(1, odd + 1))
    full = np.full(odd, np.float32(255) * share, np.float32)
    most = float(np.add.accumulate(full, dtype=np.float32)[-1])
    rounding = Lane(nn.Linear(1, 1), rank=0, size=odd)._rounding
    return {
        "lane: message (bytes)": float(ours.message().nbytes),
        "lane: verdict (us)": 1e6 * seconds_of(lambda: ours.listen(said).verdict()),
        "lane: a count of votes is off by (W - 24 ranks)": float(wrong.max()),
        "lane: samples, 255 a rank, off by (W - 24)": abs(round(most * odd) - 255.0 * odd),
        "lane: equal shares are 1 (W - 24)": float(abs(ones[-1] - 1) <= rounding),
    }


# -- the control plane --------------------------------------------------------------------------


class Alike:
    """A transport on which all others say what this rank says, and nothing takes time."""

    def __init__(self) -> None:
        self.received = 0

    def all_gather(self, parts: list[Tensor], mine: Tensor) -> None:
        for part in parts:
            part.copy_(mine)
        self.received += len(parts) * mine.nbytes

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> None:
        self.received += buffer.nbytes

    def broadcast(self, buffer: Tensor) -> None:
        self.received += buffer.nbytes

    def data_parallel(self, module: nn.Module, **options: Any) -> nn.Module:
        return module


def comm(ranks: int) -> dict[str, float]:
    """One rank's own work and traffic in a verb, without the time on the network."""
    transport = Alike()
    verbs = Comm(rank=0, size=ranks, transport=transport)
    verbs.barrier("here")
    header = transport.received
    settings = {f"name {number}": "x" * 20 for number in range(12)}
    transport.received = 0
    verbs.gather_objects("fit", settings)
    gathered = transport.received
    return {
        "comm: header (us)": 1e6 * seconds_of(lambda: verbs.barrier("here")),
        "comm: header (KB received)": header / 1e3,
        "comm: gather_objects of 12 settings (ms)": 1e3
        * seconds_of(lambda: verbs.gather_objects("fit", settings)),
        "comm: the same (MB received)": gathered / 1e6,
    }


def agreements(ranks: int) -> dict[str, float]:
    """What is agreed at a report and at the start of an epoch."""
    transport = Alike()
    clock = StragglerClock(Comm(rank=0, size=ranks, transport=transport), host="host", size=ranks)

    def compare() -> None:
        clock._steps = STEPS
        clock.compare(SECONDS)

    step = _strategy(Comm(rank=0, size=ranks, transport=transport), ranks)
    step.refresh()
    transport.received = 0
    step.refresh()
    received = transport.received
    return {
        "stragglers: who holds up the others (us)": 1e6 * seconds_of(compare),
        "epoch start: what is frozen (ms)": 1e3 * seconds_of(step.refresh),
        "epoch start: what is frozen (MB received)": received / 1e6,
    }


def _strategy(verbs: Comm, ranks: int) -> DDP:
    strategy = DDP()
    lines = [f"layers.{number}.weight [8, 8] torch.float32" for number in range(PARAMETERS)]
    strategy._micro_step = Mock(trained=Mock(lines=lambda: lines, changed=lambda: False))
    strategy._world = Mock(comm=verbs, size=ranks)
    return strategy


# -- checkpoints --------------------------------------------------------------------------------


def checkpoint(ranks: int) -> dict[str, float]:
    """Who writes what, for 7 billion parameters in float32 with AdamW; and what rank 0 commits."""
    model = _seven_billion()
    moments = {f"{name}.{one}": t for name, t in model.items() for one in ("exp_avg", "exp_avg_sq")}
    plan = seconds_of(lambda: [writing.divide(held, ranks) for held in (model, moments)])
    parts = sum(len(writing.divide(held, ranks)) for held in (model, moments))
    facts = {"bytes": 25000, "sha256": "0" * 64}
    mine = {f"{files.rank_name(0)}{end}": facts for end in (".safetensors", ".json")}
    told = len(pickle.dumps(mine)) * ranks
    verbs = Comm(rank=0, size=ranks, transport=Alike())
    with tempfile.TemporaryDirectory(prefix="dtrain-scale-") as folder:
        aside, final = files.place(Path(folder), 1)
        aside.mkdir()
        written: dict[str, Any] = {}
        content = b"x" * 12500  # a rank's random streams, in two files
        for rank in range(ranks):
            for end in (".safetensors", ".json"):
                (aside / f"{files.rank_name(rank)}{end}").write_bytes(content)
        one = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for rank in range(ranks):
            written |= {f"{files.rank_name(rank)}{end}": one for end in (".safetensors", ".json")}
        began = time.thread_time()
        files.commit(aside, final, 1, {}, written)
        commit = time.thread_time() - began
        check = seconds_of(lambda: files.check(final), least_s=0)
    return {
        "checkpoint: plan of 7 billion (ms)": 1e3 * plan,
        "checkpoint: shared parts": float(parts),
        "checkpoint: ranks' own files": 2.0 * ranks,
        "checkpoint: told to all ranks (MB received)": told / 1e6,
        "checkpoint: telling it, at each rank (ms)": 1e3
        * seconds_of(lambda: verbs.gather_objects("written", mine)),
        "checkpoint: rank 0's commit (ms)": 1e3 * commit,
        "checkpoint: check of ranks' files at a resume (s)": check,
    }


def _seven_billion() -> dict[str, Tensor]:
    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    model = {"embed": tensor(32000, 4096), "head": tensor(32000, 4096), "norm": tensor(4096)}
    for layer in range(32):
        for name in ("q", "k", "v", "o"):
            model[f"{layer}.{name}"] = tensor(4096, 4096)
        for name in ("up", "gate", "down"):
            model[f"{layer}.{name}"] = tensor(4096, 11008)
        for name in ("norm1", "norm2"):
            model[f"{layer}.{name}"] = tensor(4096)
    assert len(model) == PARAMETERS
    return model


# -- the watchdog's posts -----------------------------------------------------------------------


@contextmanager
def served_store() -> Iterator[tuple[int, int]]:
    """Serves a rendezvous store as dtrain does; gives its port and process number."""
    port = _free_port()
    script = store_process.__file__
    process = subprocess.Popen(
        [sys.executable, script, str(port), "60"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    answer = process.stdout.readline().strip()
    if answer != "serving":
        raise RuntimeError(answer)
    try:
        yield port, process.pid
    finally:
        process.communicate(store_process.END, timeout=10)


CLIENTS = 64  # connections to the store; what it costs to serve one more is in its time for a post
_served: dict[str, int] = {}
_clients: list[Store] = []


def use_store(port: int, pid: int) -> None:
    """Says which store :func:`heartbeats` is to load, and connects to it."""
    _served.update(port=port, pid=pid)
    _clients.extend(_connect(port) for _ in range(CLIENTS))


def _connect(port: int) -> Store:
    client = TCPStore(
        "127.0.0.1",
        port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=60),
    )
    return PrefixStore("dtrain/0/0", client)


def heartbeats(ranks: int) -> dict[str, float]:
    """Posts at the rendezvous store, and the reading of all of them where something is wrong."""
    store = _clients[-1]
    texts = [_heartbeat(rank).to_json() for rank in range(ranks)]

    def post() -> None:
        for rank, text in enumerate(texts):
            _clients[rank % CLIENTS].set(heartbeat_key(rank), text)
        for client in _clients:
            client.check(["failure"])  # a post is not answered; this is

    post()
    flag_cpu = _load(lambda: [store.check(["failure"]) for _ in range(200)])[1] / 200
    post_cpu = _load(post)[1] - CLIENTS * flag_cpu
    others = Others(ranks, "another machine")

    def look() -> None:
        others.read(store, 0.0)
        others.seen(0.0)

    look_s, look_cpu = _load(look)
    seen = [Seen(_heartbeat(rank), 0.0) for rank in range(ranks)]
    return {
        "heartbeats: a post (bytes)": float(len(texts[-1])),
        "heartbeats: store's time for a post (us)": 1e6 * post_cpu / ranks,
        "heartbeats: store busy with all ranks' posts (%)": 100 * 2 * post_cpu,
        "heartbeats: a look at all, at the rank (ms)": 1e3 * look_s,
        "heartbeats: a look at all, store's time (ms)": 1e3 * look_cpu,
        "heartbeats: judging them (ms)": 1e3 * seconds_of(lambda: judge(seen)),
        "heartbeats: store's time for a look for a failure (us)": 1e6 * flag_cpu,
        "heartbeats: if all ranks looked at once, store's time (s)": ranks * look_cpu,
        "heartbeats: the sixteen that do, store's time (s)": LOOKERS * look_cpu,
    }


def _heartbeat(rank: int) -> Heartbeat:
    return Heartbeat(
        rank=rank,
        host=f"gpu-node-{rank // 8:04d}",
        pid=100_000 + rank,
        machine="0b7b2b5e-0d0c-4b8e-9f0a-0a0a0a0a0a0a/pid:[4026531836]",
        number=12345,
        step=100_000,
        phase="backward (waiting for other ranks)",
        at="train.py:100",
        waits=True,
        quiet_s=1.2345678,
        limit_s=5.0,
        inside=True,
    )


def _load(call: Callable[[], object], times: int = 3) -> tuple[float, float]:
    """Returns the processor time of a median call here, and of a mean one in the store."""
    call()
    before = _processor_s(_served["pid"])
    took, calls, began = [], 0, time.perf_counter()
    while calls < times or time.perf_counter() - began < 0.3:
        start = time.thread_time()
        call()
        took.append(time.thread_time() - start)
        calls += 1
    return statistics.median(took), (_processor_s(_served["pid"]) - before) / calls


def _processor_s(pid: int) -> float:
    ns = [int((task / "schedstat").read_text().split()[0]) for task in _tasks(pid)]
    return sum(ns) / 1e9


def _tasks(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
