"""Ranks that say they are on several nodes before the first step: one is slow, or stuck."""

import io
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, redirect_stderr
from unittest.mock import patch

import pytest
import torch

import dtrain
from dtrain.distributed import health, local_store
from dtrain.testing import run_processes

ADVICE = f"dtrain: {health._ADVICE}\n"


@contextmanager
def node(name, gflops=100.0, mb_s=1000.0, **constants):
    """This rank's node has this name and these figures; what is moved, is moved for real."""
    exchange = health.exchange

    def moved(*arguments):
        exchange(*arguments)
        return mb_s

    values = {"multiply": lambda device: gflops, "exchange": moved, "_PIECES": (1 << 16,) * 3}
    with (
        patch.dict(os.environ, {"SLURMD_NODENAME": name, "LOCAL_WORLD_SIZE": "1"}),
        patch.multiple(health, **(values | constants)),
    ):
        yield


def started(**arguments):
    """Opens a world and uses it; returns what was said, and the ranks that have met."""
    said = io.StringIO()
    with redirect_stderr(said), dtrain.init(**arguments) as world:
        drawn = torch.rand(1).item()
        met = world.comm.all_gather("ranks", torch.tensor(world.rank)).tolist()
    return said.getvalue(), met, drawn


def not_called(*arguments):
    raise AssertionError("it was measured")


def stuck_until(path):
    """Computes for ever, as far as others know."""

    def multiply(device):
        while not path.exists():
            threading.Event().wait(0.02)  # polls
        return 1.0

    return multiply


def cases_of_two(folder):
    rank, told = int(os.environ["RANK"]), {}
    name = "ab"[rank]
    with node(name):
        told["well"] = started()
        told["off on rank 1"] = ()
    with node(name, multiply=not_called, exchange=not_called):
        told["off on rank 1"] = started(health=rank == 0)
        with patch.dict(os.environ, {"DTRAIN_HEALTH": "off"}):
            told["off"] = started()
    with node("a", multiply=not_called, exchange=not_called):
        told["one node"] = started()
    with node(name, gflops=[100.0, 40.0][rank]):
        told["slow"] = started()
    # Rank 1 does not move anything: rank 0 waits in vain, in the pair and for no longer.
    with node(name, _SLOT_S=0.5, **({"exchange": lambda *_: 1.0} if rank else {})):
        told["cut"] = started()
    done = folder / "done"
    more = {"multiply": stuck_until(done)} if rank else {}
    with node(name, _SLOT_S=0.1, _COME_S=0.1, **more):
        if rank == 0:
            made = health._sum_up
            health._sum_up = lambda *known: (done.touch(), made(*known))[1]
        told["silent"] = started()
    return told


def test_two_nodes(tmp_path):
    one, other = run_processes(cases_of_two, 2, tmp_path, timeout_s=60)
    assert {what: said for what, (said, _, _) in other.items() if said} == {}
    assert {what: said for what, (said, _, _) in one.items() if said} == {
        "slow": "dtrain: node b computes 40 GFLOP/s (rank 1), where the median is 100\n" + ADVICE,
        "cut": "dtrain: nodes a and b move 0 MB/s between them\n" + ADVICE,
        "silent": "dtrain: node b says nothing (rank 1)\n" + ADVICE,
    }
    for told in (one, other):
        assert {str(met) for _, met, _ in told.values()} == {"[0, 1]"}
        assert len({drawn for _, _, drawn in told.values()}) == 1


def cases_of_three():
    rank, told = int(os.environ["RANK"]), {}
    with node("abc"[rank], gflops=100.0 - rank, mb_s=[1000.0, 10.0, 1000.0][rank]):
        told["b moves little"] = started()
    # Two ranks are on one node: its pace is that of the slower.
    with node("aab"[rank], gflops=[100.0, 30.0, 100.0][rank]):
        told["rank 1"] = started()
    return told


def test_three_ranks():
    told = run_processes(cases_of_three, 3, timeout_s=60)
    assert [said for said, _, _ in told[0].values()] == [
        "dtrain: node b moves 10 MB/s to and from any other, where the median is 1000\n" + ADVICE,
        "dtrain: node a computes 30 GFLOP/s (rank 1), where the median is 100\n" + ADVICE,
    ]
    assert [said for ranks in told[1:] for said, _, _ in ranks.values()] == [""] * 4


def measured():
    rank = int(os.environ["RANK"])
    with patch.dict(os.environ, {"SLURMD_NODENAME": "ab"[rank], "LOCAL_WORLD_SIZE": "1"}):
        rank, found = dtrain.distributed.examine_job(20.0)
    return found and [(one.name, one.gflops, one.mb_s) for one in found.nodes]


def test_what_is_measured_is_measured():
    found, none = run_processes(measured, 2, timeout_s=60)
    assert none is None
    assert [name for name, _, _ in found] == ["a", "b"]
    assert all(0.01 < gflops < 1e6 and 0.01 < mb_s < 1e6 for _, gflops, mb_s in found)
    assert found[0][2] == found[1][2]


def test_a_slow_link_is_not_sat_out():
    """Of the pieces, none follows one that took long."""
    sent = []

    class Group:
        def __init__(self, *arguments):
            pass

        def allgather(self, parts, mine):
            sent.append(mine[0].numel())
            parts[0][0].copy_(mine[0])
            return self

        def wait(self, timeout):
            pass

    clock = iter([0.0, 0.1, 1.0, 1.2, 2.0, 3.0])
    with (
        patch.object(health.dist, "ProcessGroupGloo", Group),
        patch.object(health.time, "monotonic", lambda: next(clock)),
    ):
        mb_s = health.exchange(local_store(), 0, torch.device("cpu"), "gloo")
    assert [length * 4 for length in sent if length > 1] == list(health._PIECES[:3])
    assert mb_s == health._PIECES[2] / 1e6


def srun(rank, size, port, *arguments):
    """Starts one task of those that srun would; on a node of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env |= {
        "SLURM_JOB_ID": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_TASKS_PER_NODE": f"1(x{size})",
        "SLURM_STEP_NODELIST": f"n[7-{6 + size}]",
        "SLURMD_NODENAME": f"n{7 + rank}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "dtrain", "health", *arguments],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_node_that_never_comes_is_named_and_left_out(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--keep=2", f"--file={tmp_path / 'nodes'}", "--within=15"]
    tasks = [srun(rank, 3, port, *options) for rank in range(2)]
    said = [task.communicate(timeout=60)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert said[0].splitlines()[-2:] == [
        "node n9 says nothing (rank 2)",
        "chosen: n7 n8; left out: n9",
    ]
    assert said[1] == ""
    assert (tmp_path / "nodes").read_text() == "n7\nn8\n"
