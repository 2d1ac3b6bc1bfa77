"""Ranks of a host that would share a card are refused before the group opens; others are not."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch

from dtrain.distributed import environment, local_store
from dtrain.distributed.environment import check_cards
from dtrain.distributed.launchers import find_launcher
from dtrain.errors import LaunchError
from dtrain.testing import run_outcomes


def torchrun(rank, ranks, **more):
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks), **more}


def ask(monkeypatch, sees, envs, hosts=None, patience_s=5.0):
    """Has ranks, each in a thread, compare their cards; returns what each raised, in words.

    ``sees`` are the cards that each sees, in its own order.
    """
    mine, store = threading.local(), local_store()
    monkeypatch.setattr(environment, "_CARDS_S", patience_s)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(mine.cards))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=mine.cards[index])
    )
    told = [""] * len(envs)

    def run(place):
        mine.cards = sees[place]
        try:
            check_cards(envs[place], hosts[place] if hosts else "host7", store)
        except LaunchError as error:
            told[place] = str(error)

    threads = [threading.Thread(target=run, args=[place]) for place in range(len(envs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return told


def test_two_ranks_on_one_card_are_told_so_on_both(monkeypatch):
    envs = [torchrun(rank, 2) for rank in range(2)]
    for rank, words in enumerate(ask(monkeypatch, [["A"], ["A"]], envs)):
        assert words.startswith("2 ranks run on host7 (LOCAL_WORLD_SIZE=2), on 1 card: ranks 0")
        assert "ranks 0 and 1 have the same one" in words
        assert f"(rank {rank} sees torch.cuda.device_count()=1, with all cards visible)" in words
        assert "`torchrun --nproc-per-node=1`" in words
        assert "ACCELERATE_USE_CPU=true" in words
        assert 'init_process_group("gloo")' in words


def test_the_variable_that_hides_cards_is_named(monkeypatch):
    envs = [torchrun(rank, 5, CUDA_VISIBLE_DEVICES="2,3") for rank in range(5)]
    words = ask(monkeypatch, [["C", "D"]] * 5, envs)
    assert all("5 ranks run on host7 (LOCAL_WORLD_SIZE=5), on 2 cards: " in one for one in words)
    assert all("ranks 0 and 2 and 4 have the same one" in one for one in words)
    assert "rank 4 sees torch.cuda.device_count()=2, with CUDA_VISIBLE_DEVICES=2,3)" in words[4]


@pytest.mark.parametrize("visible", [{}, {"CUDA_VISIBLE_DEVICES": "0"}], ids=["cgroup", "named 0"])
def test_a_card_for_each_task_is_right(monkeypatch, visible):
    """Each sees one card, which it calls 0; only the card's own name tells them apart."""
    envs = [torchrun(rank, 3, **visible) for rank in range(3)]
    assert ask(monkeypatch, [["A"], ["B"], ["C"]], envs) == ["", "", ""]


def test_so_is_torchruns_virtual_local_rank(monkeypatch):
    envs = [torchrun(rank, 2) | {"LOCAL_RANK": "0"} for rank in range(2)]
    assert ask(monkeypatch, [["A"], ["B"]], envs) == ["", ""]


def test_enough_cards_are_not_looked_at(monkeypatch):
    def touch(index):
        raise AssertionError("the card was touched")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", touch)
    check_cards(torchrun(1, 2), "host7", None)


def test_hosts_are_judged_each_by_itself(monkeypatch):
    envs = [torchrun(rank, 2) for rank in range(2)]
    envs += [env | {"RANK": str(rank + 2)} for rank, env in enumerate(envs)]
    words = ask(monkeypatch, [["A"], ["B"], ["C"], ["C"]], envs, ["a", "a", "b", "b"])
    assert words[:2] == ["", ""]
    assert all("2 ranks run on b" in one and "ranks 2 and 3 have" in one for one in words[2:])


def test_without_a_count_the_local_rank_tells(monkeypatch):
    envs = [torchrun(rank, 2) for rank in range(2)]
    for env in envs:
        del env["LOCAL_WORLD_SIZE"]
    # Rank 0 may be alone, as far as it knows; rank 1 cannot, and waits for it in vain.
    assert ask(monkeypatch, [["A"], ["B"]], envs, patience_s=0.1) == ["", ""]
    envs[0]["LOCAL_WORLD_SIZE"] = "2"
    words = ask(monkeypatch, [["A"], ["A"]], envs)
    assert "2 ranks run on host7 (LOCAL_RANK=1)" in words[1]


def test_srun_says_how_many_run_on_each_node():
    srun = {
        "SLURM_JOB_ID": "1",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "11",
        "SLURM_STEP_NODELIST": "gpu[03-05]",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    }
    here = [find_launcher(srun | {"SLURM_NODEID": n})[1]["LOCAL_WORLD_SIZE"] for n in "0123"]
    assert here == ["4", "4", "3", "1"]


def crowd(opens_itself):
    """A rank of two on a host with one card, as far as torch says."""
    import torch.distributed as dist

    import dtrain

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid="GPU-1")
    chosen = []
    torch.cuda.set_device = lambda device: chosen.append(str(device))
    if opens_itself:
        # The last tasks of a host, each with a card of its own, which it sees as 0.
        os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) + 3)
        dist.init_process_group("gloo")
        found = dtrain.init()
        dist.destroy_process_group()
        return str(found.device), found.backend, found.local_rank, chosen
    opened = []
    dist.init_process_group = lambda *args, **options: opened.append(args)
    try:
        dtrain.init()
    except LaunchError as error:
        return str(error), dist.is_initialized() or bool(opened)
    return "nothing", opened


def test_real_ranks_find_out_before_the_group_opens():
    outcomes = run_outcomes(crowd, 2, False, timeout_s=40)
    for outcome in outcomes:
        words, opened = outcome.value
        assert "2 ranks run on" in words
        assert not opened


def test_a_group_that_the_script_opened_is_taken_and_one_card_is_card_0():
    values = [outcome.value for outcome in run_outcomes(crowd, 2, True, timeout_s=40)]
    assert values == [("cuda:0", "gloo", 3, ["cuda:0"]), ("cuda:0", "gloo", 4, ["cuda:0"])]
