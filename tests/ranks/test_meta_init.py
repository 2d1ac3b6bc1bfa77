"""Models of dtrain.meta_init: the weights of one process, of which no rank holds more than its rows."""

import pytest
import sharding
import torch
from torch import nn
from sharding import distance, strategy_of, whole

import dtrain
from dtrain.meta import recording
from dtrain.testing import run_outcomes, run_processes

EXACT = 1e-12


def make(name, *, meta):
    """As a script does; of nothing that is let go of is much kept."""
    recording.KEPT_BYTES = recording.SMALL_BYTES = 0
    if not meta:
        torch.manual_seed(1)
        return sharding.MODELS[name]().double()
    torch.manual_seed(1)
    with dtrain.meta_init():
        return sharding.MODELS[name]().double()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)


def train(strategy, name, meta):
    dtrain.init(seed=0)
    model = make(name, meta=meta)
    drawn = torch.rand(1).item()
    unmade = sum(p.is_meta for p in model.parameters())
    given = adamw if name == "odd" else torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = sharding.trainer(strategy_of(strategy), net=(model, given), micros=2)
    before = whole(trainer.model)
    trainer.fit(sharding.dataset(), batch_size=5, epochs=1)
    return before, whole(trainer.model), drawn, unmade


@pytest.mark.parametrize(
    ("size", "strategy", "name"),
    [(2, "fsdp", "odd"), (3, "fsdp", "net"), (2, "flat", "net"), (1, "fsdp", "odd")],
)
def test_the_weights_are_those_of_one_process(size, strategy, name):
    truth = run_processes(train, 1, "flat", name, False)[0]
    for before, end, drawn, unmade in run_processes(train, size, strategy, name, True):
        assert unmade == len(before)
        assert before.keys() == truth[0].keys()
        assert all(torch.equal(t, truth[0][n]) for n, t in before.items())
        assert distance(end, truth[1]) <= EXACT
        assert drawn == truth[2]
