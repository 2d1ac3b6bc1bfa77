"""Who am I: what launched this process, its seeds, and the world that init makes."""

import os
import random
import resource
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import dtrain
from dtrain.distributed.environment import allow_files
from dtrain.distributed.launchers import find_launcher, first_host
from dtrain.distributed.random_streams import derive_seed, seed_everything
from dtrain.distributed.world import current
from dtrain.errors import ConfigError, LaunchError
from dtrain.testing import run_processes

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "host7",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "712345",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_NODELIST": "gpu[01-04]",
}
SUBSETS = [set(names) for n in range(5) for names in combinations(TORCHRUN, n)]

# ----------------------------------------------------------------------------- launchers


def test_torchrun_describes_a_rank() -> None:
    assert find_launcher(TORCHRUN) == ("torchrun", {})
    assert find_launcher(SRUN | TORCHRUN) == ("torchrun", {})  # torchrun under srun


@pytest.mark.parametrize("names", SUBSETS, ids=lambda names: "+".join(sorted(names)) or "nothing")
def test_half_an_environment_is_refused(names: set[str]) -> None:
    env = {name: TORCHRUN[name] for name in names} | dict.fromkeys(TORCHRUN.keys() - names, "")
    if names <= {"MASTER_ADDR", "MASTER_PORT"}:  # left over in a profile
        assert find_launcher(env) == ("solo", {})
        return
    if names == TORCHRUN.keys() - {"LOCAL_RANK"}:  # which ranks can find out
        assert find_launcher(env) == ("torchrun", {})
        return
    with pytest.raises(LaunchError) as raised:
        find_launcher(env)
    given = ", ".join(f"{name}={value}" for name, value in TORCHRUN.items() if name in names)
    missing = ", ".join(name for name in TORCHRUN if name not in names)
    assert f"the environment has {given} but not {missing}." in str(raised.value)
    assert "torchrun --nproc-per-node=2" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": "4"}, "RANK must be from 0 to WORLD_SIZE - 1: RANK=4, WORLD_SIZE=4"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"RANK": "one"}, "RANK='one' is no number"),
        ({"WORLD_SIZE": "4.0"}, "WORLD_SIZE='4.0' is no number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is no number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is no number"),
    ],
)
def test_numbers_out_of_range_are_refused(change: dict[str, str], words: str) -> None:
    with pytest.raises(LaunchError) as raised:
        find_launcher(TORCHRUN | change)
    assert words in str(raised.value)


def test_srun_describes_a_task() -> None:
    assert find_launcher(SRUN) == (
        "slurm",
        {
            "RANK": "5",
            "WORLD_SIZE": "8",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "gpu03",
            "MASTER_PORT": "24345",
        },
    )


def test_srun_leaves_the_meeting_place_to_who_knows_better() -> None:
    _, variables = find_launcher(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4"})
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("10.0.0.1", "4")
    without_step = {k: v for k, v in SRUN.items() if not k.startswith("SLURM_STEP_NODE")}
    assert find_launcher(without_step)[1]["MASTER_ADDR"] == "gpu01"


def test_an_sbatch_script_without_srun_runs_one_process() -> None:
    sbatch = {k: v for k, v in SRUN.items() if "_STEP_" not in k} | {"SLURM_NTASKS": "8"}
    assert find_launcher(sbatch) == ("solo", {})
    assert find_launcher(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) == ("solo", {})
    assert find_launcher({}) == ("solo", {})


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"])
def test_half_of_sruns_variables_are_refused(name: str) -> None:
    with pytest.raises(LaunchError, match=f"8 tasks, but the environment has no {name}"):
        find_launcher({k: v for k, v in SRUN.items() if k != name})


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"])
def test_what_is_no_number_under_srun_is_refused(name: str) -> None:
    with pytest.raises(LaunchError, match=f"{name}='many' is no number"):
        find_launcher(SRUN | {name: "many"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu[03-05,9],x1", "gpu03"),
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("a-b-[7,9]", "a-b-7"),
        ("n[001]", "n001"),
        ("x1,gpu[03-05]", "x1"),
        ("login.cluster.org,n[1-2]", "login.cluster.org"),
        ("n[1-2].cluster.org", "n1.cluster.org"),
        ("rack[0-1]node[04-07]", "rack0node04"),
    ],
)
def test_the_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", "[1-2]", ",a"])
def test_a_node_list_without_a_host_is_refused(nodelist: str) -> None:
    with pytest.raises(LaunchError, match="set MASTER_ADDR"):
        first_host(nodelist)


# ----------------------------------------------------------------------------- seeds


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_streams_of_a_seed_are_independent() -> None:
    streams = [(), *((i,) for i in range(4)), *((i, j) for i in range(4) for j in range(4))]
    seeds = [derive_seed(seed, *stream) for seed in (0, 1, 2**32 - 1) for stream in streams]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Half of the bits differ between neighbours: 0.5 +- 5 sigma over all pairs.
    flips = [(a ^ b).bit_count() for a, b in pairwise(seeds)]
    assert abs(np.mean(flips) / 63 - 0.5) < 5 * 0.5 / (63 * len(flips)) ** 0.5


def test_seeding_starts_all_three_generators() -> None:
    seed_everything(7, 1, 2)
    once = draws()
    seed_everything(7, 1, 3)
    other = draws()
    seed_everything(7, 1, 2)
    assert draws() == once
    assert all(a != b for a, b in zip(once, other, strict=True))


# ----------------------------------------------------------------------------- init


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "must be from 0 to 2"),
        ({"timeout_s": 0}, "timeout_s=0: must be more than 0"),
    ],
)
def test_init_refuses_what_is_out_of_range(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        dtrain.init(**arguments)
    assert words in str(raised.value)
    assert current() is None


def test_a_world_of_one_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with dtrain.init(seed=4) as world:
        once = draws()
        assert (world.rank, world.local_rank, world.size, world.seed) == (0, 0, 1, 4)
        assert (world.backend, world.launcher, world.is_main) == ("none", "solo", True)
        assert not dist.is_initialized()
        assert current() is world
        assert dtrain.init(seed=5) is world
        assert world.seed == 5
        assert draws() != once
        dtrain.init(seed=4)
        assert draws() == once
    assert current() is None
    world.close()  # a second time does nothing


def test_on_main_makes_a_world_where_there_is_none() -> None:
    assert current() is None
    assert dtrain.on_main("one", lambda: 41 + 1) == 42
    world = current()
    assert world is not None
    world.close()


def lives() -> dict[str, Any]:
    """Two worlds, one after the other, in the same process."""
    told: dict[str, Any] = {}
    for life in range(2):
        with dtrain.init(seed=life) as world:
            assert dtrain.init(seed=life) is world
            told[f"draws {life}"] = draws()
            told[f"ranks {life}"] = world.comm.all_gather("r", torch.tensor(world.rank)).tolist()
            told["who"] = (world.rank, world.local_rank, world.size, world.is_main)
            told["how"] = (world.backend, world.launcher, str(world.device))
            told[f"main {life}"] = dtrain.on_main("pid", os.getpid)
        assert current() is None
        assert not dist.is_initialized()
    told["pid"] = os.getpid()
    return told


def test_init_close_and_init_again_on_two_ranks() -> None:
    one, two = run_processes(lives, 2, timeout_s=30)
    for life in range(2):
        assert one[f"draws {life}"] == two[f"draws {life}"]
        assert one[f"ranks {life}"] == two[f"ranks {life}"] == [0, 1]
        assert one[f"main {life}"] == two[f"main {life}"] == one["pid"] != two["pid"]
    assert all(a != b for a, b in zip(one["draws 0"], one["draws 1"], strict=True))
    assert (one["who"], two["who"]) == ((0, 0, 2, True), (1, 1, 2, False))
    assert one["how"] == two["how"] == ("gloo", "torchrun", "cpu")


def new_life_after_a_failure() -> str:
    with dtrain.init() as world:
        if world.rank == 0:
            world.comm.record(ValueError("of the first life"), "the first life")
        world.comm.barrier("recorded")
    with dtrain.init() as world:
        told = str(world.comm.explain(RuntimeError("of the second life")))
        world.comm.barrier("read")
    return told


def test_a_new_world_knows_nothing_of_an_old_failure() -> None:
    assert run_processes(new_life_after_a_failure, 2, timeout_s=30) == ["None", "None"]


def lives_beside_accelerate(who_is_first: str) -> list[Any]:
    """Two worlds, with what a script may make of accelerate's before or in them."""
    from accelerate import Accelerator
    from accelerate.state import PartialState

    told: list[Any] = []
    if who_is_first == "PartialState":
        PartialState()  # on CPUs, it opens a group, and takes this process for the only one
    if who_is_first == "Accelerator":
        Accelerator(cpu=True)
    for _ in range(2):
        with dtrain.init() as world:
            if who_is_first != "PartialState":
                theirs = Accelerator(cpu=True)
                told.append(theirs.gather(torch.tensor([theirs.process_index])).tolist())
            told.append(world.comm.all_gather("ranks", torch.tensor(world.rank)).tolist())
            told.append((world.local_rank == world.rank, str(world.device)))
        told.append(dist.is_initialized())
    return told


@pytest.mark.parametrize("who_is_first", ["dtrain", "PartialState", "Accelerator"])
def test_accelerate_may_come_before_or_after(who_is_first: str) -> None:
    both = run_processes(lives_beside_accelerate, 2, who_is_first, timeout_s=60)
    ranks = 1 if who_is_first == "PartialState" else 2  # how often they are told in a life
    kept = who_is_first != "dtrain"  # dtrain closes only what it has opened
    assert both == [2 * [*ranks * [[0, 1]], (True, "cpu"), kept]] * 2


def world_of_one_by_torchrun() -> tuple[int, str, str]:
    with dtrain.init() as world:
        return world.size, world.backend, world.launcher


def test_torchrun_with_one_process_is_a_world_of_one() -> None:
    assert run_processes(world_of_one_by_torchrun, 1, timeout_s=30) == [(1, "none", "torchrun")]


def test_a_process_may_open_as_many_files_as_its_world_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: raised.append(limits))
    for soft, hard in ((1024, 4096), (1024, 10**6), (10**6, 10**6), (1024, -1), (-1, -1)):
        monkeypatch.setattr(resource, "getrlimit", lambda what, got=(soft, hard): got)
        allow_files(16384)
    assert raised == [(4096, 4096), (66560, 10**6), (66560, -1)]


# ----------------------------------------------------------------------------- the script's group


def in_the_scripts_group(how: str, where: str) -> tuple[Any, ...]:
    """A rank whose script opens the group, and whom no launcher's variables say anything."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own, other = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", rank // 2
    for name in [*TORCHRUN, "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"]:
        os.environ.pop(name, None)
    if how == "ray":  # which has these, and no address
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    host, port = own.split(":")
    store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
    given: dict[str, Any] = {"rank": rank, "world_size": size}
    match how:
        case "file":
            given |= {"init_method": f"file://{where}", "backend": "gloo"}
        case "a file's store":
            given |= {"store": dist.FileStore(where, size), "backend": "gloo"}
        case "mixed":
            given |= {"store": store, "backend": "cpu:gloo"}
        case "no backend":
            given |= {"store": store}
        case "two worlds":
            apart = dist.PrefixStore(f"world {other}", store)
            given = {"store": apart, "rank": rank % 2, "world_size": 2, "backend": "gloo"}
        case _:
            given |= {"store": store, "backend": "gloo"}
    dist.init_process_group(**given)
    for _ in range(2):
        with dtrain.init() as world:
            where_it_is = (world.rank, world.local_rank, world.size, world.launcher)
            all_ranks = world.comm.gather_objects("rank", rank)
            assert world.connect is not None
            beside = world.connect()
            beside.set(f"from {rank}", "here")
            assert all(beside.get(f"from {one}") == b"here" for one in all_ranks)
        assert dist.is_initialized()  # dtrain closes only what it has opened
    dist.destroy_process_group()
    return where_it_is, all_ranks


@pytest.mark.parametrize("how", ["store", "file", "a file's store", "mixed", "no backend", "ray"])
def test_a_group_that_the_script_opened_is_used(how: str, tmp_path: Path) -> None:
    found = run_processes(in_the_scripts_group, 2, how, str(tmp_path / "meet"), timeout_s=40)
    assert found == [((rank, rank, 2, "script"), [0, 1]) for rank in range(2)]


def test_two_groups_of_the_scripts_in_one_store_are_two_worlds() -> None:
    found = run_processes(in_the_scripts_group, 4, "two worlds", "", timeout_s=40)
    assert [who[:3] for who, _ in found] == [(0, 0, 2), (1, 1, 2)] * 2
    assert [ranks for _, ranks in found] == [[0, 1]] * 2 + [[2, 3]] * 2
