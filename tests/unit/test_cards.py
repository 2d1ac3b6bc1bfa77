"""Ranks of a host that would share a card are refused before the group opens; others are not."""

import os
from types import SimpleNamespace

import pytest
import torch

from dtrain.distributed.cards import check_cards, own_card
from dtrain.distributed.launchers import find_launcher
from dtrain.distributed.meeting import Arrival
from dtrain.errors import LaunchError
from dtrain.testing import run_outcomes


def ask(monkeypatch, sees, ranks=None, hosts=None, locals_=None, **visible):
    """Has ranks say which cards they use, and rank 0 compare them; returns what it says.

    ``sees`` are the cards that each sees, in its own order; ``ranks``: how many each is told of.
    """
    arrivals = []
    for rank, cards in enumerate(sees):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if ranks:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        for name, value in visible.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: len(cards))
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda index, cards=cards: SimpleNamespace(uuid=cards[index]),
        )
        host = hosts[rank] if hosts else "host7"
        card = own_card(locals_[rank] if locals_ else rank)
        arrivals.append(Arrival(rank, host, 100 + rank, host, "", *card))
    try:
        check_cards(arrivals)
    except LaunchError as error:
        return str(error)
    return ""


def test_two_ranks_on_one_card(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    words = ask(monkeypatch, [["A"], ["A"]], 2)
    assert words.startswith("2 ranks run on host7, on 1 card: ranks 0 and 1 have the same one")
    assert "(rank 1 sees torch.cuda.device_count()=1, with all cards visible)" in words
    assert "`torchrun --nproc-per-node=1`" in words
    assert "ACCELERATE_USE_CPU=true" in words
    assert 'init_process_group("gloo")' in words


def test_the_variable_that_hides_cards_is_named(monkeypatch):
    words = ask(monkeypatch, [["C", "D"]] * 5, 5, CUDA_VISIBLE_DEVICES="2,3")
    assert "5 ranks run on host7, on 2 cards: ranks 0 and 2 and 4 have the same one" in words
    assert "(rank 4 sees torch.cuda.device_count()=2, with CUDA_VISIBLE_DEVICES=2,3)" in words


@pytest.mark.parametrize("visible", [{}, {"CUDA_VISIBLE_DEVICES": "0"}], ids=["cgroup", "named 0"])
def test_a_card_for_each_task_is_right(monkeypatch, visible):
    """Each sees one card, which it calls 0; only the card's own name tells them apart."""
    assert ask(monkeypatch, [["A"], ["B"], ["C"]], 3, **visible) == ""


def test_so_is_torchruns_virtual_local_rank(monkeypatch):
    assert ask(monkeypatch, [["A"], ["B"]], 2, locals_=[0, 0]) == ""


def test_enough_cards_are_not_looked_at(monkeypatch):
    def touch(index):
        raise AssertionError("the card was touched")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", touch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_card(1) == ("", "")


def test_hosts_are_judged_each_by_itself(monkeypatch):
    hosts, locals_ = ["a", "a", "b", "b"], [0, 1, 0, 1]
    words = ask(monkeypatch, [["A"], ["B"], ["C"], ["C"]], 2, hosts, locals_)
    assert "2 ranks run on b, on 1 card: ranks 2 and 3 have" in words
    assert ask(monkeypatch, [["A"], ["B"], ["A"], ["B"]], 2, hosts, locals_) == ""


def test_hosts_with_unequal_numbers_of_cards(monkeypatch):
    """Each has as many ranks as the largest has cards."""
    sees = [["A", "B"], ["A", "B"], ["C"], ["C"]]
    words = ask(monkeypatch, sees, 2, ["a", "a", "b", "b"], [0, 1, 0, 1])
    assert "2 ranks run on b, on 1 card: ranks 2 and 3 have the same one" in words


def test_without_a_count_cards_are_compared(monkeypatch):
    assert ask(monkeypatch, [["A", "B"], ["A", "B"]]) == ""
    assert "ranks 0 and 2 have the same one" in ask(monkeypatch, [["A", "B"]] * 3)


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
