"""What is the process's or the script's stays as it was: random streams, modes, casts, signals."""

import copy
import json
import multiprocessing
import os
import pickle
import random
import signal
import warnings

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

import dtrain
from dtrain.callbacks import Checkpoint
from dtrain.cluster.signals import SIGNALS, Launcher
from dtrain.testing import run_processes, run_ranks


def cross_entropy(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def dropout_net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 2))


def made(net, callbacks=(), *, loss=cross_entropy, lr=0.1, **options):
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    return dtrain.Trainer(net, optimizer, loss, callbacks=callbacks, **{"sinks": []} | options)


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


# ------------------------------------------------------------------------------ random streams


def study(trains):
    """Three trials in one script, each of which draws."""
    dtrain.init(seed=0)
    drawn = []
    for _ in range(3):
        drawn.append(draw())
        if trains:
            trainer = made(dropout_net_as_it_comes())
            trainer.fit(tiny.dataset(16), batch_size=8, epochs=1, eval_set=tiny.dataset(8))
            trainer.evaluate(tiny.dataset(8), batch_size=8)
        else:
            dropout_net_as_it_comes()
    return drawn


def dropout_net_as_it_comes():
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 2))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_study_draws_what_it_would_without_dtrain(world_size):
    with_fits = run_ranks(study, world_size, True)
    assert with_fits == run_ranks(study, world_size, False)
    assert len(set(with_fits[0])) == 3


def in_parts(*epochs):
    dtrain.init(seed=0)
    net = dropout_net()
    trainer = made(net)
    for epoch in epochs:
        trainer.fit(tiny.dataset(32), batch_size=8, epochs=epoch, name="main")
        draw()  # the script's own business
    return tiny.digest(net)


def test_a_further_fit_goes_on_with_its_own_streams():
    assert run_ranks(in_parts, 2, 1, 2) == run_ranks(in_parts, 2, 2)


def failing_fit():
    dtrain.init(seed=0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    def fails(net, batch):
        torch.rand(1), random.random()
        raise ValueError("planted")

    with pytest.raises((ValueError, dtrain.RemoteError)):
        made(dropout_net_kept(), loss=fails).fit(tiny.dataset(16), batch_size=8, epochs=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


def dropout_net_kept():
    with torch.random.fork_rng():
        return dropout_net()


def test_a_fit_that_fails_leaves_the_streams_as_well():
    run_ranks(failing_fit, 2)


class Draws(dtrain.Callback):
    """Draws in each hook of an evaluation, from all there is."""

    def __init__(self):
        self.drawn = []

    def draw(self, ctx):
        own = torch.rand((), generator=ctx.rng), torch.rand((), generator=ctx.shared_rng)
        self.drawn.append((*draw(), *map(float, own)))

    def on_eval_start(self, ctx):
        self.draw(ctx)

    def on_eval_batch(self, ctx, step):
        self.draw(ctx)

    def on_eval_end(self, ctx, metrics):
        self.draw(ctx)


def uses_all_streams(net, batch, ctx):
    x, y = batch
    own = torch.randn(x.shape, generator=ctx.rng) + torch.randn(x.shape, generator=ctx.shared_rng)
    return F.cross_entropy(net(x + 0.1 * torch.randn_like(x) + 0.1 * own), y)


def with_evaluations(eval_every):
    dtrain.init(seed=0)
    net, draws = dropout_net(), Draws()
    trainer = made(net, [draws], loss=uses_all_streams)
    evals = {} if eval_every is None else {"eval_set": tiny.dataset(8), "eval_every": eval_every}
    trainer.fit(tiny.dataset(32), batch_size=8, epochs=2, **evals)
    return tiny.digest(net), draws.drawn


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_that_draws_does_not_change_the_training(world_size):
    without = [digest for digest, _ in run_ranks(with_evaluations, world_size, None)]
    for eval_every in ("epoch", 1, 3):
        found = run_ranks(with_evaluations, world_size, eval_every)
        assert [digest for digest, _ in found] == without
        drawn = found[0][1]
        assert len(set(drawn)) == len(drawn) > 3  # other numbers in each evaluation
    if world_size == 2:  # each rank its own, but for what is equal on all
        for one, other in zip(found[0][1], found[1][1], strict=True):
            assert one[4] == other[4]
            assert all(a != b for a, b in zip(one[:4], other[:4], strict=True))


def evaluate_noisily(seed):
    world = dtrain.init(seed=0)
    noisy = made(dropout_net(), loss=lambda net, batch: torch.rand(()) + 0 * net(batch[0]).sum())
    torch.manual_seed(seed)
    losses = [noisy.evaluate(tiny.dataset(2), batch_size=2)["eval/loss"] for _ in range(2)]
    assert draw()[2] == float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
    return world.rank, losses


def test_an_evaluation_draws_by_the_scripts_seed_and_leaves_it():
    (_, one), (_, two) = run_ranks(evaluate_noisily, 2, 5)
    assert one == two
    assert one[0] == one[1]  # nothing was drawn in between
    (_, other), _ = run_ranks(evaluate_noisily, 2, 6)
    assert other != one


# ------------------------------------------------------------------------------ autocast


def figures_of_changed_weights():
    dtrain.init(seed=0)
    net = tiny.model()
    trainer = made(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = trainer.evaluate(tiny.dataset(16), batch_size=8)["eval/loss"]
        with torch.no_grad():
            net[0].weight.mul_(3)
        after = trainer.evaluate(tiny.dataset(16), batch_size=8)["eval/loss"]
        assert torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        right = trainer.evaluate(tiny.dataset(16), batch_size=8)["eval/loss"]
    return before, after, right


def test_an_evaluation_inside_of_an_autocast_sees_the_weights_as_they_are():
    for before, after, right in run_ranks(figures_of_changed_weights, 2):
        assert after == right != before


def losses_inside(around, callbacks=()):
    dtrain.init(seed=0)
    record, net = tiny.Record(), tiny.model()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    with around:
        net(x)  # torch keeps casts of these weights
        made(net, [record, *callbacks]).fit(tiny.dataset(32), batch_size=8, epochs=2)
        after = net(x).float()
    with around:
        assert torch.equal(net(x).float(), after)
    return record.losses


def test_a_training_inside_of_an_autocast_sees_its_updates():
    from dtrain.callbacks import MixedPrecision

    def outside():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    (inside,) = run_ranks(losses_inside, 1, outside())
    (right,) = run_ranks(
        losses_inside, 1, torch.autocast("cpu", enabled=False), [MixedPrecision("bf16")]
    )
    assert inside == pytest.approx(right, rel=1e-3)
    assert len(set(inside)) == len(inside)


# ------------------------------------------------------------------------------ modes


class Modes(dtrain.Callback):
    """Keeps which parts are in train mode, in each step."""

    def __init__(self, act=None):
        self.steps, self.act = [], act

    def on_batch(self, ctx, step):
        self.steps.append("".join("ET"[m.training] for m in ctx.model.modules()))

    def on_eval_end(self, ctx, metrics):
        if self.act is not None:
            self.act(ctx.model)


class Parts(nn.Module):
    """Modules in order: itself, backbone, its linear, norm and dropout, head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.1))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


def modes_of(change, keep=False, act=None):
    dtrain.init(seed=0)
    net, seen, words = Parts(), Modes(act), tiny.Words("message")
    change(net)
    before = [part.training for part in net.modules()]
    trainer = made(net, [seen], sinks=[words], keep_modes=keep)
    trainer.fit(tiny.dataset(16), batch_size=8, epochs=2, eval_set=tiny.dataset(8))
    assert [part.training for part in net.modules()] == before
    return seen.steps, [text for text in words.words if "mode" in text]


def all_eval(net):
    net.eval()


def frozen_backbone(net):
    net.eval()
    net.backbone.requires_grad_(False)


def new_head(net):
    net.eval()
    net.head = nn.Linear(8, 2)


def resting_norm(net):
    net.backbone[1].eval()


def resting_and_frozen(net):
    net.backbone.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "modes", "words"),
    [
        (lambda net: None, "TTTTTT", None),
        (all_eval, "TTTTTT", "note: the model came in eval mode, and is trained in train mode ("),
        (frozen_backbone, "TEEEET", "statistics), but for backbone. Trainer(keep_modes=True)"),
        (new_head, "TTTTTT", "note: the model came in eval mode"),
        (resting_norm, "TTTETT", "so it stays while it is trained: backbone.1 (no dropout"),
        (resting_and_frozen, "TEEEET", None),
    ],
)
def test_what_is_trained_is_in_train_mode(change, modes, words):
    for rank, (steps, told) in enumerate(run_ranks(modes_of, 2, change)):
        assert set(steps) == {modes}
        assert len(told) == (words is not None and rank == 0)
        assert all(words in text for text in told)


def test_modes_that_are_meant_are_kept():
    assert run_ranks(modes_of, 1, new_head, True) == [(["EEEEET"] * 4, [])]
    assert run_ranks(modes_of, 1, resting_norm, True) == [(["TTTETT"] * 4, [])]


def test_a_model_that_a_callback_leaves_in_eval_mode_is_trained_in_train_mode():
    ((steps, told),) = run_ranks(modes_of, 1, resting_norm, False, all_eval)
    assert steps == ["TTTETT"] * 4
    assert told[1].startswith("warning: a callback or the loss function left the model in eval")


# ------------------------------------------------------------------------------ signals


def children_and_handlers():
    """Forks in the middle of fit, as a loader of one's own does; then looks at what is left."""
    before = [signal.getsignal(number) for number in SIGNALS]
    filters, environment = list(warnings.filters), dict(os.environ)
    codes = []

    class Forks(dtrain.Callback):
        def on_step_end(self, ctx, step):
            child = multiprocessing.get_context("fork").Process(target=signal.pause)
            child.start()
            child.terminate()
            child.join(10)
            codes.append(child.exitcode)
            child.kill()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        kept = list(warnings.filters)
        made(tiny.model(), [Forks()]).fit(tiny.dataset(16), batch_size=8, epochs=1)
        assert list(warnings.filters) == kept
    assert list(warnings.filters) == filters
    assert dict(os.environ) == environment
    assert [signal.getsignal(number) for number in SIGNALS] == before
    return codes


def test_children_die_of_a_term_and_handlers_are_as_before():
    assert run_processes(children_and_handlers, 1) == [[-signal.SIGTERM] * 2]


def hang_up(run_dir):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it

    class Closes(dtrain.Callback):
        def on_step_end(self, ctx, step):
            if step.number == 3:
                os.kill(os.getpid(), signal.SIGHUP)

    trainer = made(tiny.model(), [Closes(), Checkpoint()], run_dir=run_dir)
    result = trainer.fit(tiny.dataset(64), batch_size=8, epochs=9)
    return result.preempted, result.stop_reason, os.listdir(run_dir / "checkpoints")


def test_a_terminal_that_closes_is_a_preemption(tmp_path):
    ((preempted, reason, saved),) = run_processes(hang_up, 1, tmp_path)
    assert (preempted, reason) == (True, "SIGHUP")
    assert len(saved) == 1
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "preempted"


def test_a_launcher_that_is_gone_is_told_of_once(monkeypatch):
    monkeypatch.setattr("dtrain.cluster.signals._LOOK_S", 0.001)
    looks, asked, told = iter([False, True]), [], multiprocessing.Event()

    def ask(why):
        asked.append(why)
        told.set()

    with Launcher(ask, lambda: next(looks)):
        assert told.wait(10)
    assert asked == ["the launcher (torchrun) is gone"]
    with Launcher(ask, None):
        pass
    assert len(asked) == 1


# ------------------------------------------------------------------------------ the script's own


def bounded():
    dtrain.init(seed=0)
    trainer = made(tiny.model())
    options = {"batch_size": 8, "log_every": 1, "name": "main"}
    steps = [
        [
            row["step"]
            for row in trainer.fit(tiny.dataset(32), epochs=1, history=3, **options).history
        ],
        [row["step"] for row in trainer.fit(tiny.dataset(32), epochs=2, **options).history],
    ]
    with pytest.raises(dtrain.ConfigError, match="history=0: must be a whole number"):
        trainer.fit(tiny.dataset(32), epochs=3, history=0, **options)
    return steps


def test_a_history_can_be_bounded():
    assert run_ranks(bounded, 1) == [[[2, 3, 4], [5, 6, 7, 8]]]


def pickled():
    dtrain.init(seed=0)
    trainer = made(tiny.model())
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(dtrain.ConfigError, match="a Trainer cannot be pickled or copied"):
            attempt(trainer)
    with pytest.raises(dtrain.ConfigError, match="nor what holds one, such as a dataset"):
        pickle.dumps({"in a dataset": trainer.fit})


def test_a_trainer_cannot_be_pickled():
    run_ranks(pickled, 1)


def unseeded(ranks_that_seed, by_init):
    if int(os.environ["RANK"]) in ranks_that_seed:
        dtrain.init(seed=0) if by_init else torch.manual_seed(1)
    net = nn.Linear(8, 2)
    after = torch.get_rng_state()
    words = tiny.Words("message")
    trainer = made(net, sinks=[words])
    # A script that has seeded by itself draws what it would without us.
    kept = torch.equal(torch.get_rng_state(), after)
    trainer.fit(tiny.dataset(16), batch_size=8, epochs=1)
    return [text for text in words.words if "torch.manual_seed" in text], kept


def test_a_script_that_seeds_nothing_is_told():
    ((told, _),) = run_processes(unseeded, 1, (), True)
    assert told == [
        "note: rank 0 called neither dtrain.init(seed=...) nor torch.manual_seed before the "
        "Trainer was made: what was drawn until then, such as weights or a split of the data, is "
        "another in each run. Call dtrain.init first."
    ]
    assert run_processes(unseeded, 1, (0,), False) == [([], True)]
    assert run_processes(unseeded, 1, (0,), True) == [([], True)]
    (told, _), _ = run_processes(unseeded, 2, (0,), True)
    assert len(told) == 1
    assert "rank 1 called neither" in told[0]
