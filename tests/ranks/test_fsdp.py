"""Sharded models: the numbers of one process, and whatever one rank does is agreed by all."""

import os
import signal
import threading
import time

import pytest
import sharding
import torch
from sharding import distance, loss_fn, make, strategy_of, whole
from torch import nn

import dtrain
from dtrain.callbacks import Freeze
from dtrain.checkpoint import writer
from dtrain.errors import ConfigError, RankMismatch, RemoteError, UnusedParameters
from dtrain.strategies import FSDP
from dtrain.testing import RanksFailed, run_outcomes, run_processes, run_ranks

EXACT = 1e-12

# ------------------------------------------------------------------- as many ranks, as one process


class SkipSome(dtrain.Callback):
    """Skips what holds a marked sample, wherever it lands: before the forward, or after it."""

    def __init__(self, hook, marked=(3, 11)):
        self.hook, self.marked = hook, marked

    def holds_one(self, step):
        return bool(torch.isin(step.batch[2], torch.tensor(self.marked)).any())

    def on_batch(self, ctx, step):
        if self.hook == "on_batch" and self.holds_one(step):
            ctx.request.skip("marked")

    def on_loss(self, ctx, step):
        if self.hook == "on_loss" and self.holds_one(step):
            ctx.request.skip("marked")


class Stream:
    """A rank's own batches; some ranks have fewer, and one has none in the first epoch."""

    def __init__(self, rank):
        self.rank, self.epoch = rank, 0

    def __iter__(self):
        self.epoch += 1
        data = sharding.dataset(40)
        for number in range(0 if self.rank == 1 and self.epoch == 1 else 2 + self.rank):
            yield data[10 * self.rank + 3 * number : 10 * self.rank + 3 * number + 2]


#: What differs from case to case: keyword arguments of a trainer, and of ``fit``.
CASES = {
    "plain": ({}, {"batch_size": 5}),
    "odd, a batch smaller than the world": ({"model": "odd"}, {"batch_size": 2}),
    "accumulated": ({"micros": 2, "model": "odd"}, {"batch_size": 5}),
    "accumulated unevenly": ({"micros": 3}, {"batch_size": 7}),
    "in boxes": ({"model": "boxes"}, {"batch_size": 2}),
    "skips before": ({"callbacks": [("skip", "on_batch")]}, {"batch_size": 5}),
    "skips after": ({"callbacks": [("skip", "on_loss")], "micros": 2}, {"batch_size": 6}),
    "frozen for an epoch": ({"callbacks": [("freeze", "blocks.1")]}, {"batch_size": 8}),
    "streams": ({"stream": True}, {}),
    "streams, accumulated": ({"stream": True, "micros": 2, "model": "odd"}, {}),
}


def callback_of(kind, what):
    return SkipSome(what) if kind == "skip" else Freeze(what, until_epoch=1)


def train(strategy, case, options=None):
    given, fit = CASES[case]
    given = dict(given)
    streams = given.pop("stream", False)
    given["callbacks"] = [callback_of(*one) for one in given.get("callbacks", ())]
    rank = dtrain.init(seed=0).rank
    data = dtrain.Data(Stream(rank)) if streams else sharding.dataset()
    evaluates = {} if streams else {"eval_set": sharding.dataset(9)}
    trainer = sharding.trainer(strategy_of(strategy, **options or {}), **given)
    result = trainer.fit(data, **fit, epochs=2, **evaluates)
    return whole(trainer.model), result.metrics


def train_all(strategy, cases=tuple(CASES), options=None):
    dtrain.init(seed=0)
    return {case: train(strategy, case, options) for case in cases}


WHOLE = [case for case in CASES if "skip" not in case and "stream" not in case]


QUICK = ["odd, a batch smaller than the world", "skips after", "streams, accumulated"]
SLOW = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
    ("size", "cases"),
    [(2, QUICK), pytest.param(2, [*CASES], **SLOW), pytest.param(3, [*CASES], **SLOW)],
    ids=["some", "2", "3"],
)
def test_the_numbers_are_those_of_other_strategies(size, cases):
    """Of one process, but for skips and streams, in which each rank has its own."""
    fsdp = run_processes(train_all, size, "fsdp", cases, timeout_s=100)
    truth = run_processes(train_all, size, "flat", cases, timeout_s=100)[0]
    truth |= run_processes(train_all, 1, "flat", [case for case in cases if case in WHOLE])[0]
    for case, (expected, metrics) in truth.items():
        for found, figures in (ranks[case] for ranks in fsdp):
            assert distance(found, expected) <= EXACT, case
            for name in ("train/loss", "eval/loss"):
                if name in metrics:
                    assert figures[name] == pytest.approx(metrics[name], rel=1e-12), case
            assert all(torch.equal(t, fsdp[0][case][0][n]) for n, t in found.items()), case


# ------------------------------------------------------------------- one rank fails, all know


class Planted(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("planted in backward")


#: Where in a micro-step: before the model runs, at each of its parts, after it, and in backward.
PLACES = ["on_batch", "first", "blocks.0", "blocks.1.a", "blocks.2.b", "head", "loss", "on_loss"]
PLACES += [f"backward of {name}" for name in ("head", "blocks.2", "blocks.1.norm", "blocks.0.a")]


class Plant(dtrain.Callback):
    """Fails on one rank, once, in a micro-batch of a step."""

    def __init__(self, rank, place, step, micro):
        self.armed, self.place, self.at = rank, place, (step, micro)
        self.handle = None

    def is_due(self, step, place):
        due = self.armed and self.place == place and (step.number, step.micro) == self.at
        if due:
            self.armed = False
            raise ValueError(f"planted in {place}")

    def on_batch(self, ctx, step):
        self.is_due(step, "on_batch")
        self.model, self.step = ctx.model, step
        kind, _, name = self.place.rpartition("backward of ")
        names = dict(ctx.model.named_modules())
        if not self.armed or name not in names or (step.number, step.micro) != self.at:
            return
        self.armed = False

        def fail(module, args):
            raise ValueError(f"planted in {self.place}")

        if kind:
            self.handle = names[name].register_forward_hook(lambda m, a, out: Planted.apply(out))
        else:
            self.handle = names[name].register_forward_pre_hook(fail)

    def on_loss(self, ctx, step):
        self.is_due(step, "on_loss")


class Keeps(dtrain.Callback):
    """Keeps the parameters as a step begins."""

    def on_step_start(self, ctx, step):
        self.before = [p.detach().clone() for p in ctx.model.parameters()]


def loss_with(plant):
    def loss(model, batch):
        try:
            found = loss_fn(model, batch)
        finally:
            if plant.handle is not None:
                plant.handle.remove()
                plant.handle = None
        plant.is_due(plant.step, "loss")
        return found

    return loss


def fit_with(plant, strategy, fit, **more):
    """Fits with a fault; returns the trainer, what it raised, and whether nothing was applied."""
    keeps = Keeps()
    trainer = sharding.trainer(strategy, loss=loss_with(plant), callbacks=[plant, keeps], **more)
    try:
        trainer.fit(sharding.dataset(), **fit)
        told = "nothing"
    except Exception as error:  # noqa: BLE001 -- looked at by the test
        told = f"{type(error).__name__}: {error}"
    same = all(
        torch.equal(a.to_local(), b.to_local())
        for a, b in zip(keeps.before, trainer.model.parameters(), strict=True)
    )
    return trainer, told, same


def fail_and_go_on(places, micros, model, at):
    """Fails, and calls fit again; returns what was raised, and how far off the end is."""
    world = dtrain.init(seed=0)
    fit = {"batch_size": 6, "epochs": 2}
    straight = sharding.trainer(FSDP(), micros=micros, model=model)
    straight.fit(sharding.dataset(), **fit)
    expected = whole(straight.model)
    found = {}
    for place in places:
        for rank in range(world.size):
            plant = Plant(rank == world.rank, place, *at)
            trainer, told, same = fit_with(plant, FSDP(), fit, micros=micros, model=model)
            step = trainer.context.progress.step
            trainer.fit(sharding.dataset(), **fit)
            found[place, rank] = told, step, same, distance(whole(trainer.model), expected)
    return found


@pytest.mark.parametrize(
    ("micros", "model", "at", "places"),
    [
        (1, "net", (0, 0), ["blocks.0"]),
        (2, "odd", (2, 1), ["blocks.1.a", "backward of blocks.1.norm"]),
        pytest.param(1, "net", (0, 0), PLACES, **SLOW),
        pytest.param(1, "net", (3, 0), PLACES, **SLOW),
        pytest.param(2, "odd", (3, 0), PLACES[3:], **SLOW),
        pytest.param(2, "odd", (0, 1), PLACES[3:], **SLOW),
    ],
)
def test_a_failure_anywhere_is_agreed_in_its_step_and_fit_goes_on(micros, model, at, places):
    ranks = run_processes(fail_and_go_on, 2, places, micros, model, at, timeout_s=100)
    for rank, cases in enumerate(ranks):
        for (place, failing), (told, step, same, far) in cases.items():
            where = (place, failing, rank)
            kind, name = (
                ("ValueError", "") if rank == failing else ("RemoteError", f"rank {failing}")
            )
            assert told.startswith(kind), (where, told)
            assert name in told, (where, told)
            assert "planted in" in told, where
            assert step == at[0], where
            assert same, where
            assert far <= EXACT, (where, far)


class Swapping(sharding.Net):
    """On one rank, from some forward on, equal blocks come in another order."""

    swaps_from, forwards, left_out = 10**6, 0, None

    def forward(self, x):
        if self.training:
            self.forwards += 1
        x = self.first(x)
        swapped = self.forwards > self.swaps_from
        for place in (2, 1, 0) if swapped else (0, 1, 2):
            x = x if place == self.left_out else self.blocks[place](x)
        return self.head(x)


def diverge(how, at):
    world = dtrain.init(seed=0)
    torch.manual_seed(1)
    model = Swapping().double()
    odd_one = world.rank == world.size - 1

    def loss(net, batch):
        step = trainer.context.progress.step
        drops = how == "drops" and odd_one and step == at
        net.left_out = 1 if drops or how == "never" else None
        found = loss_fn(net, batch)
        if how == "unused" and odd_one and step == at:
            found = dtrain.Loss(net.first(batch[0]).square().mean(), weight=1.0)
        if how == "backward" and step == at:
            found.mean.backward()
        if how == "evaluates":
            trainer.evaluate(sharding.dataset(4), batch_size=2)
        if how == "gathers":
            trainer.context.comm.gather_with_grad("outputs", net(batch[0]))
        if how == "nothing":
            found.mean = torch.zeros((), requires_grad=True)
        return found

    class Calls(dtrain.Callback):
        """What code of one rank may do: it uses the model where others do not."""

        def on_step_end(self, ctx, step):
            if how == "alone" and odd_one and step.number == at:
                ctx.model(torch.zeros(1, sharding.WIDTH).double())

    if how == "swap" and odd_one:
        model.swaps_from = at
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = sharding.trainer(
        FSDP(), net=(model, optimizer), loss=loss, callbacks=[Calls()], hang_after_s=6.0
    )
    before = whole(model)
    try:
        trainer.fit(sharding.dataset(), batch_size=6, epochs=2)
    except Exception as error:
        error.add_note(f"at step {trainer.context.progress.step}")
        if at == 0 and how != "alone":
            assert all(torch.equal(t, before[n]) for n, t in whole(model).items())
        raise


@pytest.mark.parametrize(
    ("how", "at", "kind", "words"),
    [
        ("swap", 0, RankMismatch, "rank 1: micro_step.model.blocks.2"),
        ("swap", 3, RankMismatch, "in different orders"),
        ("alone", 2, ConfigError, "outside of a training step"),
        ("nothing", 0, UnusedParameters, "no gradient reached"),
        ("evaluates", 0, ConfigError, "cannot be called in a loss function"),
        ("never", 0, UnusedParameters, "no gradient reached blocks.1.norm.weight"),
        ("drops", 0, RankMismatch, "rank 1: micro_step.model.blocks.2"),
        ("gathers", 0, ConfigError, "gather_with_grad does not work under strategy='fsdp' yet"),
    ],
)
def test_ranks_that_part_are_told_so_in_that_step(how, at, kind, words):
    outcomes = run_outcomes(diverge, 2, how, at, timeout_s=40)
    kinds = [type(outcome.error) for outcome in outcomes]
    assert kind in kinds, outcomes
    assert set(kinds) <= {kind, RemoteError}, outcomes
    assert all(words in str(outcome.error) for outcome in outcomes), outcomes
    assert all(f"at step {at}" in outcome.trace for outcome in outcomes) or how == "alone"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "at", "words"),
    [
        ("unused", 3, "all ranks wait for one another"),
        ("drops", 3, "all ranks wait for one another"),
        ("backward", 2, "backward()"),
    ],
)
def test_a_step_that_cannot_be_reduced_ends_in_an_error_on_all(how, at, words):
    began = time.monotonic()
    outcomes = run_outcomes(diverge, 2, how, at, timeout_s=40)
    assert time.monotonic() - began < 25
    assert all(outcome.error is not None for outcome in outcomes), outcomes
    assert any(words in f"{o.error} {o.output}" for o in outcomes), outcomes


def emergency(run_dir, mode):
    """Fails on one rank; or goes on from what was saved then."""
    world = dtrain.init(seed=0)
    plant = Plant(mode == "fails" and world.rank == 1, "blocks.1", 3, 0)
    trainer = sharding.trainer(
        FSDP(), loss=loss_with(plant), callbacks=[plant], run_dir=run_dir if mode else None
    )
    resume = "emergency" if mode == "goes on" else "auto"
    trainer.fit(sharding.dataset(), batch_size=6, epochs=2, resume=resume)
    return whole(trainer.model)


@pytest.mark.slow
def test_what_was_saved_when_a_step_failed_is_gone_on_with(tmp_path):
    outcomes = run_outcomes(emergency, 2, tmp_path, "fails")
    assert [type(outcome.error) for outcome in outcomes] == [RemoteError, ValueError]
    expected = run_processes(emergency, 2, tmp_path, "")[0]
    (found, _) = run_processes(emergency, 3, tmp_path, "goes on")[:2]
    assert distance(found, expected) <= EXACT


def vanish(how, where):
    world = dtrain.init(seed=0)

    class Goes(dtrain.Callback):
        def on_step_start(self, ctx, step):
            self.due = world.rank == 1 and step.number == 3

    goes = Goes()

    def go(grad=None):
        if goes.due and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if goes.due:
            threading.Event().wait(30)

    def loss(model, batch):
        found = loss_fn(model, batch)
        if where == "forward":
            go()
        else:
            found.mean.register_hook(go)
        return found

    trainer = sharding.trainer(FSDP(), loss=loss, callbacks=[goes], hang_after_s=3.0)
    began = time.monotonic()
    try:
        trainer.fit(sharding.dataset(), batch_size=6, epochs=2)
    except Exception as error:
        error.add_note(f"after {time.monotonic() - began:.1f} s")
        raise


@pytest.mark.parametrize(
    ("how", "where"),
    [
        ("killed", "backward"),
        pytest.param("killed", "forward", **SLOW),
        pytest.param("hangs", "forward", **SLOW),
        pytest.param("hangs", "backward", **SLOW),
    ],
)
def test_a_rank_that_is_gone_or_stuck_is_named(how, where):
    began = time.monotonic()
    outcomes = run_outcomes(vanish, 2, how, where, timeout_s=40)
    assert time.monotonic() - began < 20
    told = f"{outcomes[0].error} {outcomes[0].output}"
    assert "rank 1 on" in told, outcomes
    assert ("gone" if how == "killed" else "without any progress") in told, told


class Parts(nn.Module):
    """Frozen blocks, checkpointed ones, a method that is no forward, and buffers."""

    _no_split_modules = ("Block",)

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(sharding.WIDTH, sharding.WIDTH)
        self.one = sharding.Block().requires_grad_(False)
        self.two = nn.ModuleDict({"a": sharding.Block(), "b": sharding.Block()})
        self.norm = nn.BatchNorm1d(sharding.WIDTH, affine=False)
        self.head = nn.Linear(sharding.WIDTH, 2)

    def encode(self, x):
        hidden = self.one(self.first(x))
        for block in self.two.values():
            hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
        return hidden

    def forward(self, x):
        return self.head(self.norm(self.encode(x)) if len(x) > 99 else self.encode(x))


def nested(name, module):
    return name in ("two.a", "two.a.a")


def parts(strategy, options, optimizer):
    dtrain.init(seed=0)
    torch.manual_seed(1)
    model = Parts().double()
    made = {
        "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2),
        "sgd": lambda net: torch.optim.SGD(
            [
                {"params": net.head.parameters(), "lr": 0.1},
                {"params": [*net.first.parameters(), *net.two.parameters()]},
            ],
            lr=0.05,
            momentum=0.9,
            nesterov=True,
        ),
        "rmsprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=1e-3, centered=True),
        "adagrad": lambda net: torch.optim.Adagrad(net.parameters(), lr=1e-2),
    }[optimizer]

    def loss(net, batch):
        found = loss_fn(net, batch)
        found.mean = found.mean + 1e-2 * net.encode(batch[0]).square().mean()
        return found

    trainer = sharding.trainer(
        strategy_of(strategy, **options),
        net=(model, made(model) if optimizer == "adamw" else made),
        loss=loss,
        micros=2,
    )
    for _ in range(2):  # a further fit of a live trainer
        trainer.fit(sharding.dataset(), batch_size=5, epochs=1)
    return whole(model)


@pytest.mark.parametrize(
    ("options", "optimizer"),
    [
        pytest.param({}, "adamw", **SLOW),
        pytest.param({"reshard": False}, "sgd", **SLOW),
        pytest.param(
            {"blocks": nested},
            "rmsprop",
            marks=pytest.mark.slow,
        ),
        pytest.param({"blocks": [sharding.Block]}, "adagrad", **SLOW),
    ],
)
def test_options_and_optimizers_change_no_number(options, optimizer):
    expected = run_processes(parts, 3, "flat", {}, optimizer)[0]
    for found in run_processes(parts, 3, "fsdp", options, optimizer):
        assert distance(found, expected) <= EXACT


class Writes(dtrain.Callback):
    def __init__(self, hook):
        self.hook = hook

    def write(self, ctx):
        with torch.no_grad():
            ctx.model.first.weight.mul_(0.5)

    def on_batch(self, ctx, step):
        if self.hook == "on_batch" and step.number == 1:
            self.write(ctx)

    def on_step_end(self, ctx, step):
        if self.hook == "on_step_end" and step.number == 1:
            self.write(ctx)


def written(strategy, hook, on):
    world = dtrain.init(seed=0)
    callbacks = [Writes(hook if on in (None, world.rank) else "")]
    trainer = sharding.trainer(strategy_of(strategy), callbacks=callbacks)
    trainer.fit(sharding.dataset(), batch_size=5, epochs=1)
    return whole(trainer.model)


def test_a_write_stays_or_is_refused():
    expected = run_processes(written, 2, "flat", "on_step_end", None)[0]
    for found in run_processes(written, 2, "fsdp", "on_step_end", None):
        assert distance(found, expected) <= EXACT
    outcomes = run_outcomes(written, 2, "fsdp", "on_batch", 1)
    assert all("written to in the middle of a forward" in str(o.error) for o in outcomes)


def held():
    dtrain.init(seed=0)
    notes = []
    for keeps in (True, False):
        model, optimizer = make()
        kept = [*model.parameters()] if keeps else []
        trainer = sharding.trainer(FSDP(), net=(model, optimizer))
        notes.append([note for note in trainer._outbox.notes if "held elsewhere" in note])
        del kept
    return notes


def test_parameters_that_are_held_elsewhere_are_told_of():
    for some, none in run_processes(held, 2):
        assert some[0].startswith("note: 22 of the model's parameters are held elsewhere")
        assert not none


# ------------------------------------------------------------------- evaluation, and predicting


def evaluated(strategy):
    """Ragged sets, before any training and after; a failure on one rank in the middle of it."""
    world = dtrain.init(seed=0)
    fails = [False]

    def eval_fn(model, batch):
        hidden = model(batch[0])
        if fails[0] and 8 in batch[2].tolist():
            model.blocks[1].a.weight.new_zeros(1).reshape(2)
        return loss_fn(lambda x: hidden, batch)

    trainer = sharding.trainer(strategy_of(strategy), eval_fn=eval_fn)
    found = [trainer.evaluate(sharding.dataset(n), batch_size=4)["eval/loss"] for n in (1, 9)]
    trainer.fit(sharding.dataset(), batch_size=5, max_steps=3, eval_set=sharding.dataset(10))
    found.append(trainer.context.metrics["eval/loss"])
    streams = dtrain.Data([sharding.dataset(30)[i : i + 3] for i in range(0, 4 * world.rank, 2)])
    told = []
    for _ in range(2):
        fails[0] = not fails[0]
        try:
            found.append(trainer.evaluate(sharding.dataset(13), batch_size=3)["eval/loss"])
        except Exception as error:  # noqa: BLE001 -- looked at by the test
            told.append(f"{type(error).__name__}: {error}")
    found.append(trainer.evaluate(streams)["eval/loss"])
    rows = trainer.predict(sharding.dataset(11), batch_size=4, fn=lambda m, b: m(b[0]))
    trainer.fit(sharding.dataset(), batch_size=5, max_steps=6)
    return found, told, torch.stack(rows), whole(trainer.model)


@pytest.mark.parametrize("size", [2, pytest.param(3, **SLOW)])
def test_evaluation_meets_in_each_forward_whoever_has_a_batch(size):
    truth = run_processes(evaluated, size, "flat")
    ranks = run_processes(evaluated, size, "fsdp")
    for (found, told, rows, end), (expected, _, expected_rows, expected_end) in zip(
        ranks, truth, strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-12)
        assert len(told) == 1
        assert "invalid for input of size 1" in told[0]
        assert (rows - expected_rows).abs().max() <= EXACT
        assert distance(end, expected_end) <= EXACT


# ------------------------------------------------------------------- checkpoints


def moments(trainer):
    """Returns the optimizer's state by name, whole. Ranks: all, communicates."""
    named = {id(p): name for name, p in trainer.model.named_parameters()}
    return {
        f"{named[id(p)]}/{key}": (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()
        for p, held in trainer.optimizer.state.items()
        for key, t in held.items()
    }


class Weigh(dtrain.Callback):
    """Notes the parameters, and the optimizer's state, as a fit begins."""

    begin = None

    def on_epoch_start(self, ctx):
        self.begin = self.begin or (whole(ctx.model), moments(ctx))


def go_on(run_dir, strategy, epochs, model):
    """Goes on with a run; returns what it began with, and what it ended with."""
    dtrain.init(seed=0)
    weigh = Weigh()
    callbacks = [weigh, dtrain.callbacks.Checkpoint(every_epochs=1, keep=9)]
    callbacks.append(dtrain.callbacks.EarlyStopping("eval/loss", patience=50))
    trainer = sharding.trainer(
        strategy_of(strategy), model=model, callbacks=callbacks, run_dir=run_dir
    )
    fit = {"batch_size": 5, "eval_set": sharding.dataset(9)}
    trainer.fit(sharding.dataset(), epochs=epochs, **fit)
    end = whole(trainer.model), moments(trainer)
    plain, _ = make(model)
    dtrain.load_model(run_dir, plain)
    loaded = {name: p.detach() for name, p in plain.named_parameters()}
    assert all(torch.equal(t, loaded[n]) for n, t in end[0].items())
    names = {path.name for path in (run_dir / "checkpoints").glob("*/*")}
    return weigh.begin, end, {name for name in names if not name.startswith("rank-")}


CHAIN = [(2, "fsdp"), (3, "fsdp"), (1, "fsdp"), (2, "flat"), (2, "fsdp"), (2, "ddp")]


@pytest.mark.parametrize("model", ["net", pytest.param("odd", **SLOW)])
def test_a_run_goes_on_with_other_strategies_and_other_numbers_of_ranks(tmp_path, model):
    chain = CHAIN if model == "odd" else CHAIN[:2] + CHAIN[3:5]
    straight = run_processes(go_on, 2, tmp_path / "straight", "flat", len(chain), model)[0]
    last_end = None
    for epochs, (size, strategy) in enumerate(chain, 1):
        ranks = run_processes(go_on, size, tmp_path / "run", strategy, epochs, model)
        begin, end, files = ranks[0]
        for found, expected in zip(begin, last_end, strict=True) if last_end else ():
            assert found.keys() == expected.keys()
            assert all(torch.equal(t, expected[n]) for n, t in found.items()), (size, strategy)
        last_end = end
    assert distance(last_end[0], straight[1][0]) <= EXACT
    assert distance(last_end[1], straight[1][1]) <= EXACT
    assert files == straight[2]
    exported = tmp_path / "whole.safetensors"
    dtrain.export_model(tmp_path / "run", exported)
    plain, _ = make(model)
    dtrain.load_model(exported, plain)
    assert all(torch.equal(p.detach(), last_end[0][n]) for n, p in plain.named_parameters())


def in_parts(run_dir):
    """A checkpoint in several files, without the frozen layer; loaded into sharded models."""
    dtrain.init(seed=0)
    writer.PART_BYTES = 400
    models = [make("odd") for _ in range(3)]
    checkpoint = dtrain.callbacks.Checkpoint(every_steps=2, trainable_only=True)
    first = sharding.trainer(FSDP(), net=models[0], run_dir=run_dir, callbacks=[checkpoint])
    first.fit(sharding.dataset(), batch_size=6, epochs=1)
    sharding.trainer(FSDP(), net=models[1])
    for model, _ in models[1:]:
        path = dtrain.load_model(run_dir, model, strict=False)
    end, *others = [whole(model) for model, _ in models]
    assert all(torch.equal(t, end[n]) for other in others for n, t in other.items())
    checkpoint = dtrain.callbacks.Checkpoint(every_steps=2, trainable_only=True)
    again = sharding.trainer(FSDP(), net=make("odd"), run_dir=run_dir, callbacks=[checkpoint])
    again.fit(sharding.dataset(), batch_size=6, epochs=2)
    return {file.name for file in path.iterdir()}, whole(again.model)


def trained(strategy, model):
    dtrain.init(seed=0)
    trainer = sharding.trainer(strategy, model=model)
    trainer.fit(sharding.dataset(), batch_size=6, epochs=2)
    return whole(trainer.model)


@pytest.mark.slow
def test_a_checkpoint_of_several_files_is_written_and_read(tmp_path):
    (files, end), _ = run_processes(in_parts, 2, tmp_path / "run")
    assert {"model-00002-of-00002.safetensors", "state-00001-of-00002.safetensors"} <= files
    assert distance(end, run_processes(trained, 1, "flat", "odd")[0]) <= EXACT


# ------------------------------------------------------------------- what a step costs

COLLECTIVES = [
    "all_gather_single",
    "reduce_scatter_single",
    "all_reduce",
    "all_gather",
    "broadcast",
]


class Count(dtrain.Callback):
    """Counts collectives in each step, but the first two."""

    def __init__(self):
        self.counts, self.found = dict.fromkeys(COLLECTIVES, 0), []
        for name in COLLECTIVES:
            setattr(torch.distributed, name, self.counted(name, getattr(torch.distributed, name)))

    def counted(self, name, real):
        def call(*args, **kwargs):
            self.counts[name] += 1
            return real(*args, **kwargs)

        return call

    def on_step_start(self, ctx, step):
        self.counts.update(dict.fromkeys(self.counts, 0))

    def on_step_end(self, ctx, step):
        if step.number > 1:
            self.found.append({name: n for name, n in self.counts.items() if n})


def costs(clips):
    world = dtrain.init(seed=0)
    from torch.distributed.fsdp import fully_shard

    count = Count()
    callbacks = [count, *([dtrain.callbacks.ClipGradients(1.0)] if clips else [])]
    model, optimizer = make()
    trainer = dtrain.Trainer(
        model, optimizer, loss_fn, callbacks=callbacks, sinks=[], strategy="fsdp"
    )
    # The last batch of an epoch has one sample: a rank is without.
    trainer.fit(sharding.dataset(21), batch_size=4, epochs=2)
    plain, optimizer = make()
    for block in plain.blocks:
        fully_shard(block)
    fully_shard(plain)
    for _ in range(3):
        count.counts.update(dict.fromkeys(count.counts, 0))
        plain(torch.ones(2, sharding.WIDTH, dtype=torch.float64)).sum().backward()
    return count.found, {name: n for name, n in count.counts.items() if n}, world.size


@pytest.mark.parametrize("clips", [pytest.param(False, **SLOW), True])
def test_a_step_has_the_collectives_of_plain_fsdp(clips):
    for found, plain, _ in run_processes(costs, 2, clips):
        assert plain == {"all_gather_single": 7, "reduce_scatter_single": 4}
        assert len(found) == 10
        norm = {"all_reduce": 1} if clips else {}
        assert all(one == plain | norm for one in found)


# ------------------------------------------------------------------- mixed precision, guards, votes


class Asks(dtrain.Callback):
    def __init__(self, asks):
        self.asks = asks

    def on_step_end(self, ctx, step):
        if self.asks and step.number == 3:
            ctx.request.stop("enough")


class Poisons(dtrain.Callback):
    """A NaN in the rows of one rank only."""

    def __init__(self, poisons):
        self.poisons = poisons

    def on_grads_ready(self, ctx, step):
        if self.poisons and step.number == 2:
            for grad in ctx.gradients()[:1]:
                grad.fill_(torch.nan)


def mixed(strategy, options, *names):
    world = dtrain.init(seed=0)
    known = {
        "bf16": lambda: dtrain.callbacks.MixedPrecision("bf16"),
        "stop": lambda: Asks(world.rank == world.size - 1),
        "poison": lambda: Poisons(strategy == "flat" or world.rank == world.size - 1),
        "guard": lambda: dtrain.callbacks.NonFiniteGuard("skip"),
        "stats": lambda: dtrain.callbacks.GradientStats(every=2),
        "schedule": lambda: dtrain.callbacks.LRSchedule(
            lambda opt, steps: torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
        ),
    }
    torch.manual_seed(1)
    model = sharding.Net().float()

    def loss(net, batch):
        x, y, number = batch
        assert (
            not world.size > 1 or "params" not in options or net.head.weight.dtype is torch.bfloat16
        )
        out = net(x.float())
        weights = 1.0 + (number % 3)
        each = ((out.float() - y.float()) ** 2).mean(-1)
        return dtrain.Loss((each * weights).sum() / weights.sum(), weight=weights.sum())

    trainer = sharding.trainer(
        strategy_of(strategy, **options),
        net=(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)),
        callbacks=[known[name]() for name in names],
        micros=2,
        loss=loss,
    )
    result = trainer.fit(sharding.dataset(), batch_size=5, epochs=3)
    every = {p.dtype for p in model.parameters()}
    assert every == {torch.float32}
    return whole(model), trainer.context.progress.updates, result.stop_reason, result.metrics


@pytest.mark.parametrize(
    ("options", "names", "updates", "close"),
    [
        ({}, ("guard", "stop", "schedule", "stats"), 5, 1e-5),
        ({}, ("poison", "guard"), 14, 1e-5),
        pytest.param({}, ("bf16", "schedule"), 15, 2e-2, **SLOW),
        ({"params": "bf16", "reduce": "float32"}, ("schedule",), 15, 2e-2),
    ],
    ids=["votes", "NaN on one rank", "autocast", "bf16"],
)
def test_callbacks_and_lower_precision(options, names, updates, close):
    autocast = ("bf16",) if "params" in options else ()
    expected = run_processes(mixed, 2, "flat", {}, *names, *autocast)[0]
    for found in run_processes(mixed, 2, "fsdp", options, *names):
        assert found[1] == updates
        assert found[1:3] == expected[1:3]
        for name, value in expected[0].items():
            assert torch.allclose(found[0][name], value, rtol=close, atol=close), name
        norms = [name for name in expected[3] if name.startswith("grad_norm/")]
        assert len(norms) == 22 * ("stats" in names)
        for name in ("train/loss", "grad_norm", *norms):
            assert found[3][name] == pytest.approx(expected[3][name], rel=max(close, 1e-4)), name


# ------------------------------------------------------------------- what is refused


class Ema(dtrain.callbacks.EMA):
    """One of the user's own, which looks at whole weights."""

    whole_weights = True


def tied(model):
    model.blocks[2].a.weight = model.blocks[0].a.weight


def scalar(model):
    model.scale = nn.Parameter(torch.ones((), dtype=torch.float64))


REFUSED = {
    "does not work with a loss scale": {"callbacks": ["fp16"]},
    "Ema: works on whole weights": {"callbacks": ["own ema"]},
    "LBFGS looks at whole parameters": {"optimizer": "lbfgs"},
    "works with one update in a step only": {"optimizer": "two"},
    "blocks.0.a.weight and blocks.2.a.weight are one parameter": {"change": tied},
    "scale have no dimension to shard": {"change": scalar},
    "must be all float32 or all float64": {"change": lambda model: model.head.bfloat16()},
    "is compiled": {"change": lambda model: model.blocks[0].compile(backend="eager")},
    "gradients of table are sparse": {
        "change": lambda model: setattr(model, "table", nn.Embedding(3, 2, sparse=True).double())
    },
    "chose no part of the model, which has": {"options": {"blocks": [nn.Conv2d]}},
    "blocks is a list of modules": {"options": {"blocks": lambda name, module: name == "blocks"}},
    "lr_range_test does not work with strategy='fsdp' yet": {"tunes": True},
    "are sharded already": {"twice": True},
    "hooks on gradients (head.weight": {
        "change": lambda model: model.head.weight.register_hook(lambda grad: grad)
    },
    "writes its parameters (max_norm)": {
        "change": lambda model: setattr(model, "table", nn.Embedding(3, 2, max_norm=1.0).double())
    },
}


def refused():
    dtrain.init(seed=0)
    known = {
        "fp16": lambda: dtrain.callbacks.MixedPrecision("fp16"),
        "own ema": lambda: Ema(0.9),
    }
    told = {}
    for words, case in REFUSED.items():
        model, optimizer = make()
        case.get("change", lambda model: None)(model)
        optimizer = {
            "lbfgs": lambda net: torch.optim.LBFGS(net.parameters()),
            "two": lambda net: {
                "a": torch.optim.SGD([*net.blocks.parameters(), *net.head.parameters()]),
                "b": torch.optim.SGD(net.first.parameters()),
            },
        }.get(case.get("optimizer"), lambda net: torch.optim.AdamW(net.parameters()))
        try:
            for _ in range(1 + case.get("twice", False)):
                made = sharding.trainer(
                    FSDP(**case.get("options", {})),
                    net=(model, optimizer),
                    callbacks=[known[name]() for name in case.get("callbacks", ())],
                )
            if "tunes" in case:
                dtrain.tuning.lr_range_test(made, sharding.dataset(), batch_size=6)
            told[words] = "nothing"
        except ConfigError as error:
            told[words] = str(error)
    return told


def test_what_does_not_work_is_refused_in_words():
    for told in run_processes(refused, 2):
        for words, found in told.items():
            assert words in found, found


def test_torch_before_2_13_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.12.1+cpu")
    with pytest.raises(ConfigError, match=r"needs torch 2\.13 or newer, .* this is 2\.12\.1"):
        FSDP().check(accumulates=False)


def alone(options):
    model, optimizer = make()
    return sharding.trainer(FSDP(**options), net=(model, optimizer))


def test_what_one_rank_or_threads_cannot_do_is_refused():
    with pytest.raises(RanksFailed, match="one rank gathers nothing"):
        run_ranks(alone, 1, {"params": "bf16"})
    with pytest.raises(RanksFailed, match="needs ranks that are processes"):
        run_ranks(alone, 2, {})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reshard": 2}, "a number is not supported"),
        ({"params": "fp16"}, "'bf16', or None"),
        ({"reduce": "bf16"}, "below float32 it would be rounded"),
    ],
)
def test_options_that_do_not_work_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        FSDP(**options)
