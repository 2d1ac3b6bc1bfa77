"""What a step asks of a GPU, counted where there is none (benchmarks/launches.py), stays little."""

import sys
from pathlib import Path

import pytest
import torch

import dtrain
from dtrain import accelerator
from dtrain.testing import run_processes

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import launches

#: More launches than the loop by hand that does the same, at most.
LIMITS = {
    (1, "bare"): 2,
    (1, "ClipGradients"): -1,  # folded into the optimizer
    (1, "five of these"): 12,
    (2, "bare"): 5,
    (2, "ClipGradients"): 5,
    (2, "five of these"): 12,
}


def count(cases, strategies):
    """Returns the figures of each case by hand and by each strategy, in this process's world."""
    torch.set_num_threads(1)
    dtrain.init(seed=0)
    return {
        case: {
            "by hand": launches.by_hand(**launches.SAME.get(case, {})),
            **{name: launches.by_dtrain(launches.CASES[case](), name) for name in strategies},
        }
        for case in cases
    }


@pytest.fixture(scope="module")
def counts():
    cases = ["bare", "ClipGradients", "five of these"]
    threads = torch.get_num_threads()
    alone = count(cases, ["flat"])
    torch.set_num_threads(threads)
    first, second = run_processes(count, 2, cases, ["flat", "ddp"])
    assert first == second
    return {1: alone, 2: first}


@pytest.mark.parametrize(
    ("size", "case", "strategy"),
    [
        (size, case, strategy)
        for size, case in LIMITS
        for strategy in (("flat",) if size == 1 else ("flat", "ddp"))
    ],
)
def test_a_step_launches_little_more_than_by_hand(counts, size, case, strategy):
    row = counts[size][case]
    ours, by_hand = row[strategy], row["by hand"]
    more = {
        name: ours["by_name"].get(name, 0) - by_hand["by_name"].get(name, 0)
        for name in {*ours["by_name"], *by_hand["by_name"]}
    }
    told = {name: n for name, n in more.items() if n}
    assert ours["launches"] - by_hand["launches"] <= LIMITS[size, case], told
    assert by_hand["launches"] > 20  # it counts at all
    assert (ours["pinned"], ours["events"]) == (0, 0)
    assert ours["records"] <= 2  # that the batch, and what ranks said, have arrived


class Plants(dtrain.Callback):
    """Asks in each step for what costs."""

    def on_step_end(self, ctx, step):
        beside = accelerator.of(ctx.device)
        beside.pinned(1, torch.float32)
        beside.event().record()
        self._number.add_(1)

    def on_fit_start(self, ctx):
        self._number = torch.zeros(())


def test_the_count_can_fail():
    bare, planted = (launches.by_dtrain(callbacks) for callbacks in ([], [Plants()]))
    more = {name: planted[name] - bare[name] for name in ("pinned", "events", "records")}
    assert more == {"pinned": 1, "events": 1, "records": 1}
    assert planted["by_name"]["add_"] == bare["by_name"].get("add_", 0) + 1
    assert planted["launches"] > bare["launches"]
