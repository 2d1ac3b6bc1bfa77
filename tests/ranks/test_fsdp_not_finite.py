"""What is not finite on one rank only, where each holds rows: seen by all, in that step."""

import math

import pytest
import sharding
import torch
from sharding import strategy_of, whole

import dtrain
from dtrain.callbacks import GradientStats, NonFiniteGuard
from dtrain.testing import run_processes


class Poisons(dtrain.Callback):
    """Makes one number of one rank's rows NaN or infinite, in a step."""

    def __init__(self, what, value, *, on):
        self.what, self.value, self.on = what, value, on

    def is_due(self, step):
        return self.on and step.number == 2

    def put(self, tensor):
        with torch.no_grad():
            rows = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            rows.view(-1)[-1:] = self.value

    def on_step_start(self, ctx, step):
        if self.what == "parameter" and self.is_due(step):
            self.put(ctx.model.blocks[1].a.weight)

    def on_grads_ready(self, ctx, step):
        if self.what == "gradient" and self.is_due(step):
            self.put(ctx.model.blocks[1].a.weight.grad)

    def on_loss(self, ctx, step):
        if self.what == "loss" and self.is_due(step):
            step.loss.mean = step.loss.mean * self.value


class Notes(dtrain.Sink):
    def __init__(self):
        self.texts = []

    def write(self, report):
        self.texts.append(report.text)


class Norms(dtrain.Callback):
    """Keeps what is agreed in each step."""

    def __init__(self):
        self.norms, self.applied = [], []

    def on_grads_ready(self, ctx, step):
        self.norms.append(float(ctx.gradient_norm()))

    def on_step_end(self, ctx, step):
        self.applied.append(step.applied)


#: What becomes of the third step: what is not finite, of which value, what the guard does; what is
#: told of it; and in which steps the update is applied.
CASES = [
    ("gradient", math.nan, "skip", "rank 1: the gradient of 'blocks.1.a.weight' is", [1, 1, 0, 1]),
    ("gradient", math.inf, "stop", "rank 1: the gradient of 'blocks.1.a.weight' is", [1, 1, 0, 1]),
    ("loss", math.nan, "skip", "rank 1, micro-batch 0: the loss is NaN", [1, 1, 0, 1]),
    ("parameter", math.nan, "skip", "rank 1: NaN or infinite before the step: p", [1, 1, 0, 0]),
    ("gradient", math.nan, "ignore", "rank 1: the gradient of 'blocks.1.a.weight' is", [1] * 4),
    ("loss", math.inf, None, "the loss is not finite at step 2", [1] * 4),
]


def train(strategy, what, value, action):
    world = dtrain.init(seed=0)
    # A gradient, or a parameter, is all ranks' where it is not sharded.
    on = world.rank == world.size - 1 or (strategy == "flat" and what != "loss")
    norms, notes = Norms(), Notes()
    guards = [NonFiniteGuard(action)] if action else []
    trainer = sharding.trainer(
        strategy_of(strategy),
        callbacks=[Poisons(what, value, on=on), GradientStats(every=1), norms, *guards],
        sinks=[notes],
    )
    result = trainer.fit(sharding.dataset(), batch_size=6, epochs=1, log_every=1)
    figures = [{n: v for n, v in row.items() if "per_s" not in n} for row in result.history]
    return whole(trainer.model), (norms.norms, norms.applied, figures), "\n".join(notes.texts)


def train_all(strategy):
    return [train(strategy, *case[:3]) for case in CASES]


def test_what_is_not_finite_on_one_rank_is_seen_by_all_in_that_step():
    truth = run_processes(train_all, 2, "flat")
    ranks = run_processes(train_all, 2, "fsdp")
    for number, (what, value, action, words, applied) in enumerate(CASES):
        for rank in (0, 1):
            weights, (norms, took, figures), told = ranks[rank][number]
            expected, (expected_norms, _, expected_figures), _ = truth[rank][number]
            assert took == applied, (what, value, action)
            assert norms == pytest.approx(expected_norms, rel=1e-12, nan_ok=True)
            for mine, other in zip(figures, expected_figures, strict=True):
                assert mine == pytest.approx(other, rel=1e-12, nan_ok=True)
            for name, tensor in weights.items():
                assert torch.allclose(tensor, expected[name], rtol=1e-11, equal_nan=True), name
            assert rank or words in told, told
            assert "loss_of" not in told
