"""Scripts with several fits, as users of other trainers write them, killed and started again."""

import json
import os

import pytest
import tiny
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import EMA, Checkpoint, EarlyStopping, LRSchedule
from dtrain.errors import ConfigError, RemoteError
from dtrain.testing import run_outcomes, run_processes

KILLED = 9


class Dies(dtrain.Callback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, ctx, step):
        if ctx.progress.step == self.at:
            os._exit(KILLED)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Tanh())
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


class Script:
    """What is alike in all of them. ``at`` is a step to die at, ``after`` a fit."""

    def __init__(self, run_dir, at, after, optimizer, callbacks=(), net=None, **saves):
        dtrain.init(seed=0)
        self.net, self.after, self.results = net or Net(), after, []
        self.trainer = dtrain.Trainer(
            self.net,
            optimizer,
            tiny.loss_fn,
            callbacks=[*callbacks, Checkpoint(**saves), Dies(at)],
            sinks=[],
            run_dir=run_dir,
        )

    def fit(self, samples=48, batch_size=16, **how):
        if "max_steps" not in how:
            how = {"epochs": 1} | how
        result = self.trainer.fit(tiny.dataset(samples), batch_size=batch_size, **how)
        self.results.append((result.steps, result.epochs, result.stop_reason, result.metrics))
        if len(self.results) == self.after:
            os._exit(KILLED)
        return result

    def end(self):
        return tiny.digest(self.net), self.results


def adam(net):
    return torch.optim.AdamW(net.parameters(), 1e-2)


def thaw(run_dir, at, after):
    """The head first, by one cycle; then all, the backbone in a group with a rate of its own."""
    net = Net()
    net.backbone.requires_grad_(False)
    head = torch.optim.AdamW(net.head.parameters(), 1e-2)
    cycle = LRSchedule(lambda opt, n: OneCycleLR(opt, [0.1, 0.01][: len(opt.param_groups)], n))
    script = Script(run_dir, at, after, head, [cycle], net, every_steps=2)
    script.fit(epochs=2)
    net.backbone.requires_grad_(True)
    script.trainer.optimizer.add_param_group({"params": net.backbone.parameters(), "lr": 1e-3})
    script.fit(epochs=2)
    return script.end()


def new_head(run_dir, at, after):
    """The best of one task, then another head, another optimizer, and other data."""
    averages = [EMA(0.9), EarlyStopping("eval/loss", patience=1, restore_best=True)]
    script = Script(run_dir, at, after, adam, averages, every_steps=2)
    script.fit(epochs=2, eval_set=tiny.dataset(40))
    torch.manual_seed(5)
    script.net.head = nn.Linear(16, 5)
    script.trainer.optimizer = torch.optim.SGD(script.net.parameters(), 0.1, momentum=0.9)
    script.fit(40, 8, epochs=1, eval_set=tiny.dataset(24))
    return script.end()


def shrink(run_dir, at, after):
    """More data in each round, from weights that are halved in between."""
    script = Script(run_dir, at, after, adam)
    for number in range(3):
        script.fit(24 + 8 * number, 8, name=f"round {number}")
        with torch.no_grad():
            for p in script.net.parameters():
                p.mul_(0.5)
    return script.end()


def grow(run_dir, at, after):
    """A layer more in each fit, and evaluations and predictions in between."""
    script = Script(run_dir, at, after, adam, every_fits=2)
    for number in range(3):
        if number:
            torch.manual_seed(number)
            script.net.backbone.append(layer := nn.Linear(16, 16))
            script.trainer.optimizer.add_param_group({"params": layer.parameters(), "lr": 1e-3})
        script.fit(24 + 8 * number, 8)
        script.trainer.evaluate(tiny.dataset(16), batch_size=8)
        script.trainer.predict(TensorDataset(torch.ones(5, 8)), batch_size=2, fn=lambda m, b: m(*b))
    return script.end()


class CountsEpochs(dtrain.Callback):
    """A tweak of one's own that has a state: the rate falls with each epoch of the run."""

    def __init__(self):
        self.epochs = 0

    def on_epoch_end(self, ctx):
        self.epochs += 1

    def on_step_start(self, ctx, step):
        for group in ctx.optimizer.param_groups:
            group["lr"] = 0.01 / (1 + self.epochs)

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


def a_bit_more(run_dir, at, after):
    """Until it is good enough: how many fits there are, their results decide."""
    script = Script(run_dir, at, after, adam, [CountsEpochs()])
    while True:
        result = script.fit(eval_set=tiny.dataset(40), name=f"round {len(script.results)}")
        if result.metrics["eval/loss"] < 0.35 or len(script.results) == 4:
            return script.end()


def folds(run_dir, at, after):
    """A Trainer, and a folder, for each fold; the second is killed."""
    ends = []
    for fold in range(3):
        mine = (at, after) if fold == 1 else (-1, -1)
        script = Script(run_dir / f"fold {fold}", *mine, adam)
        script.fit(epochs=3, name="fold")
        ends.append(script.end())
    return ends


def two_trainers(run_dir, at, after):
    """Another Trainer, with callbacks of its own, goes on with the run and the model."""
    first = Script(run_dir, at, after, adam, every_steps=2)
    first.fit(epochs=2, name="first")
    cycle = [LRSchedule(lambda opt, n: OneCycleLR(opt, 0.05, n))]
    second = Script(run_dir, at, after - 1, adam, cycle, first.net, every_steps=2)
    second.fit(40, 8, epochs=1, name="second")
    return second.end()


SCRIPTS = [thaw, new_head, shrink, grow, a_bit_more, folds, two_trainers]
#: Killed at a step, or after a fit.
PLACES = [(8, -1), (-1, 1), (-1, 2)]


def check(script, tmp_path, world_size, places):
    whole = run_processes(script, world_size, tmp_path / "whole", -1, -1)
    for at, after in places:
        run_dir = tmp_path / f"{at} {after}"
        codes = {o.exitcode for o in run_outcomes(script, world_size, run_dir, at, after)}
        assert KILLED in codes
        assert run_processes(script, world_size, run_dir, -1, -1) == whole, (at, after)


def test_what_was_changed_before_a_fit_that_is_over_was_trained_since(tmp_path):
    check(shrink, tmp_path, 1, [(-1, 2)])


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_anywhere_and_started_again_they_end_alike(tmp_path, script):
    check(script, tmp_path, 2, PLACES[: 2 if script is folds else 3])  # that has but one fit


def test_a_fit_ends_once_the_checkpoint_under_way_is_written(tmp_path):
    script = Script(tmp_path, -1, -1, adam, every_steps=2, every_fits=2)
    script.fit()
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["status"], status["step"], status["saved"]) == ("finished", 3, 2)


def renamed(run_dir, at, name):
    script = Script(run_dir, at, -1, adam, every_steps=2)
    script.fit(epochs=2, name=name)
    return script.end()


def test_a_name_that_changes_with_each_start_is_told(tmp_path):
    run_outcomes(renamed, 1, tmp_path, 5, "at 10:05")
    [outcome] = run_outcomes(renamed, 1, tmp_path, -1, "at 10:06")
    assert isinstance(outcome.error, ConfigError)
    assert "call fit(name='at 10:05') first" in str(outcome.error)


def test_the_same_name_for_another_fit_is_told(tmp_path):
    script = Script(tmp_path, -1, -1, adam)
    begun = script.trainer.restore()
    script.fit(name="train")
    assert begun.step == 0  # as it was then
    with pytest.raises(ConfigError, match="give the new one a name of its own"):
        script.fit(name="train")


def fewer_or_more(run_dir, count):
    script = Script(run_dir, -1, -1, adam)
    for _ in range(count):
        script.fit()
    return script.end()


def test_a_script_with_a_fit_more_or_less_when_it_is_started_again(tmp_path):
    [whole] = run_processes(fewer_or_more, 1, tmp_path / "whole", 3)
    run_processes(fewer_or_more, 1, tmp_path / "run", 2)
    [more] = run_processes(fewer_or_more, 1, tmp_path / "run", 3)
    assert more == whole
    [fewer] = run_processes(fewer_or_more, 1, tmp_path / "run", 2)
    assert fewer == (whole[0], whole[1][:2])  # the model is what the run has come to


def of_ranks(run_dir):
    script = Script(run_dir, -1, -1, adam)
    for _ in range(1 + dtrain.init().rank):
        script.fit()


def test_ranks_that_differ_in_how_many_fits_they_call_end_with_words(tmp_path):
    outcomes = run_outcomes(of_ranks, 2, tmp_path, timeout_s=40)
    assert isinstance(outcomes[1].error, RemoteError)
    assert "rank 0" in str(outcomes[1].error)
    assert "its process is gone" in str(outcomes[1].error)
