"""A Trainer that nobody holds is gone at once, and its model with it: nobody waits for garbage."""

import gc
import subprocess
import sys
import weakref

import pytest
import tiny
import torch

import dtrain
from dtrain.callbacks import EMA, ClipGradients, NonFiniteGuard
from dtrain.testing import run_processes


def left_over(strategy):
    dtrain.init(seed=0)
    gc.collect()
    gc.disable()
    try:
        trainer = tiny.trainer([ClipGradients(1.0), NonFiniteGuard(), EMA(0.9)], strategy=strategy)
        trainer.fit(tiny.dataset(32), batch_size=8, epochs=1, eval_set=tiny.dataset(8))
        model, optimizer = weakref.ref(trainer.model), weakref.ref(trainer.optimizer)
        held = [model() is None, optimizer() is None]
        del trainer
        return held, [model() is None, optimizer() is None]
    finally:
        gc.enable()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_model_and_optimizer_go_with_the_trainer(world_size, strategy):
    torch.manual_seed(0)
    for before, after in run_processes(left_over, world_size, strategy):
        assert before == [False, False]
        assert after == [True, True]


FIRST = """
import gc, weakref
import torch, dtrain
gc.disable()

def made():
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = dtrain.Trainer(model, optimizer, lambda model, batch: model(batch).sum(), sinks=[])
    return [weakref.ref(one) for one in (model, optimizer, trainer)]

dtrain.init(seed=0)
print([one() for one in made()])
"""


def test_the_first_optimizer_of_a_process_holds_nobodys_frames():
    said = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=60)
    assert said.stdout == "[None, None, None]\n", said.stderr
