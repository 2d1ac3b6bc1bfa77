"""Stopped after any epoch or step and started again: the end is the same, bit for bit."""

import json
import os

import pytest
import tiny
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import dtrain
from dtrain.callbacks import (
    Checkpoint,
    ClipGradients,
    EarlyStopping,
    GradientAccumulation,
    LRSchedule,
    MixedPrecision,
)
from dtrain.errors import ResumeError
from dtrain.sinks import JSONLines
from dtrain.testing import run_outcomes, run_processes

EPOCHS = 4


class Die(dtrain.Callback):
    """Ends the process at a place in the run, as kill -9 would."""

    def __init__(self, hook, at):
        self.hook, self.at = hook, at

    def on_step_end(self, ctx, step):
        if self.hook == "step" and ctx.progress.step == self.at:
            os._exit(9)

    def on_epoch_start(self, ctx):
        if self.hook == "epoch_start" and ctx.progress.epoch == self.at:
            os._exit(9)

    def on_epoch_end(self, ctx):
        if self.hook == "epoch_end" and ctx.progress.epoch == self.at:
            os._exit(9)


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 2))


class Noise(dtrain.Callback):
    """Draws from both of the context's generators, which a resume must restore."""

    def on_batch(self, ctx, step):
        x, y = step.batch
        step.batch = (x + 0.01 * torch.randn(x.shape, generator=ctx.rng), y)

    def on_grads_ready(self, ctx, step):
        for p in ctx.model.parameters():
            p.grad += 1e-3 * torch.randn(p.shape, generator=ctx.shared_rng)


def train(run_dir, hook="", at=0, resume="auto", schedule="epoch", epochs=EPOCHS):
    if schedule == "step":
        scheduler = LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, steps))
    else:
        scheduler = LRSchedule(lambda opt, epochs: StepLR(opt, 1, gamma=0.5), every="epoch")
    callbacks = [
        MixedPrecision("bf16"),
        ClipGradients(max_norm=0.5),
        GradientAccumulation(micro_batch_size=6),
        Noise(),
        scheduler,
        EarlyStopping("eval/loss", patience=50, restore_best=True),
        Checkpoint(every_steps=3, every_epochs=1),
        Die(hook, at),
    ]
    dtrain.init(seed=0)
    trainer = dtrain.Trainer(
        net(), tiny.adam, tiny.loss_fn, callbacks=callbacks, sinks=[JSONLines()], run_dir=run_dir
    )
    data = tiny.dataset(50)
    result = trainer.fit(
        data, batch_size=24, epochs=epochs, eval_set=data, log_every=2, resume=resume
    )
    return tiny.digest(trainer.model), result.steps, result.epochs, result.metrics


def lines(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return rows


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("schedule", ["step", "epoch"])
def test_killed_anywhere_and_started_again(tmp_path, world_size, schedule):
    whole = run_processes(train, world_size, tmp_path / "whole", "", 0, "auto", schedule)
    places = [("epoch_end", epoch) for epoch in range(EPOCHS)]
    places += [("epoch_start", 1), ("step", 5), ("step", 3)]
    for hook, at in places:
        run_dir = tmp_path / f"{hook}-{at}"
        killed = run_outcomes(train, world_size, run_dir, hook, at, "auto", schedule)
        assert {outcome.exitcode for outcome in killed} == {9}
        assert json.loads((run_dir / "status.json").read_text())["status"] == "running"
        again = run_processes(train, world_size, run_dir, "", 0, "auto", schedule)
        assert again == whole
        assert json.loads((run_dir / "status.json").read_text())["status"] == "finished"
        assert lines(run_dir) == lines(tmp_path / "whole")


def test_a_finished_run_goes_on_with_more_epochs(tmp_path):
    whole = run_processes(train, 2, tmp_path / "whole", "", 0, "auto", "epoch", 4)
    run_processes(train, 2, tmp_path / "two", "", 0, "auto", "epoch", 2)
    assert run_processes(train, 2, tmp_path / "two", "", 0, "auto", "epoch", 4) == whole


def test_a_finished_run_is_not_begun_again_by_accident(tmp_path):
    run_processes(train, 2, tmp_path / "run", "", 0, "auto", "epoch", 1)
    first, second = run_outcomes(train, 2, tmp_path / "run", "", 0, "auto", "epoch", 1)
    assert isinstance(first.error, ResumeError)
    for choice in ("larger epochs", "another run_dir", "resume='never'"):
        assert choice in str(first.error)
    assert "rank 0 on" in str(second.error)
    assert "is finished" in str(second.error)
    anew = run_processes(train, 2, tmp_path / "run", "", 0, "never", "epoch", 1)
    assert anew == run_processes(train, 2, tmp_path / "other", "", 0, "auto", "epoch", 1)
    assert (tmp_path / "run" / "before-1" / "metrics.jsonl").exists()


def test_more_ranks_than_before(tmp_path):
    run_outcomes(train, 1, tmp_path / "run", "epoch_end", 1)
    digests = run_processes(train, 2, tmp_path / "run", "", 0, "must")
    assert digests[0] == digests[1]
    assert digests[0][1:3] == (12, 4)


def fit_twice():
    whole = tiny.trainer([tiny.Record()])
    whole.fit(tiny.dataset(), batch_size=24, epochs=3)
    twice = tiny.trainer([tiny.Record()])
    twice.fit(tiny.dataset(), batch_size=24, epochs=1, name="main")
    result = twice.fit(tiny.dataset(), batch_size=24, epochs=3, name="main")
    return tiny.digest(whole.model) == tiny.digest(twice.model), result.epochs, result.steps


def test_a_second_call_of_a_fit_goes_on_in_memory():
    assert run_processes(fit_twice, 2) == [(True, 3, 12)] * 2
