"""Sharded models: the numbers of one process, and whatever one rank does is agreed by all."""

import pytest
import sharding
import torch
from sharding import distance, loss_fn, make, strategy_of, whole
from torch import nn

import dtrain
from dtrain.callbacks import Freeze
from dtrain.errors import ConfigError, RankMismatch, RemoteError, UnusedParameters
from dtrain.strategies import FSDP
from dtrain.testing import run_outcomes, run_processes

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
    "skips before": ({"callbacks": [("skip", "on_batch")]}, {"batch_size": 5}),
    "skips after": ({"callbacks": [("skip", "on_loss")], "micros": 2}, {"batch_size": 6}),
    "frozen for an epoch": ({"callbacks": [("freeze", "blocks.1")]}, {"batch_size": 8}),
    "streams": ({"stream": True}, {}),
    "streams, accumulated": ({"stream": True, "micros": 2, "model": "odd"}, {}),
}
SMALLER = {  # options of FSDP that change no number
    "kept": {"reshard": False},
    "in one": {"blocks": lambda name, module: name == "blocks"},
    "by class": {"blocks": [sharding.Block]},
}


def callback_of(kind, what):
    return SkipSome(what) if kind == "skip" else Freeze(what, until_epoch=1)


def train(strategy, case, options=None):
    given, fit = CASES[case]
    given = dict(given)
    stream = given.pop("stream", False)
    given["callbacks"] = [callback_of(*one) for one in given.get("callbacks", ())]
    rank = dtrain.init(seed=0).rank
    data = dtrain.Data(Stream(rank)) if stream else sharding.dataset()
    trainer = sharding.trainer(strategy_of(strategy, **options or {}), **given)
    result = (
        trainer.fit(
            data,
            **fit,
            epochs=3,
            eval_set=sharding.dataset(9),
            **({} if fit else {"eval_every": None}),
        )
        if not stream
        else trainer.fit(data, epochs=3)
    )
    return whole(trainer.model), result.metrics, trainer.optimizer.state_dict()["state"]


def train_all(strategy, cases=tuple(CASES), options=None):
    dtrain.init(seed=0)
    return {case: train(strategy, case, options)[:2] for case in cases}


WHOLE = [case for case in CASES if "skip" not in case and "stream" not in case]


@pytest.mark.parametrize("size", [2, 3])
def test_the_numbers_are_those_of_other_strategies(size):
    """Of one process, but for skips and streams, in which each rank has its own."""
    fsdp = run_processes(train_all, size, "fsdp", timeout_s=100)
    truth = run_processes(train_all, size, "flat", timeout_s=100)[0]
    truth |= run_processes(train_all, 1, "flat", WHOLE)[0]
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
PLACES += ["backward of first"]


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


def fail_and_go_on(places, micros, model, at):
    """Fails, and calls fit again; returns what was raised, and how far the end is from a whole run."""
    world = dtrain.init(seed=0)
    fit = {"batch_size": 6, "epochs": 2}
    straight = sharding.trainer(FSDP(), micros=micros, model=model)
    straight.fit(sharding.dataset(), **fit)
    expected = whole(straight.model)
    found = {}
    for place in places:
        for rank in range(world.size):
            plant = Plant(rank == world.rank, place, *at)
            trainer = sharding.trainer(
                FSDP(), micros=micros, model=model, loss=loss_with(plant), callbacks=[plant]
            )
            before = []

            class Keeps(dtrain.Callback):
                def on_step_start(self, ctx, step, before=before):
                    before[:] = [p.detach().clone() for p in ctx.model.parameters()]

            trainer.hooks._bound[dtrain.Callback.on_step_start] += (
                lambda ctx, step, keeps=Keeps(): keeps.on_step_start(ctx, step),
            )
            try:
                trainer.fit(sharding.dataset(), **fit)
                told = "nothing"
            except Exception as error:  # noqa: BLE001 -- looked at by the test
                told = f"{type(error).__name__}: {error}"
            same = all(
                torch.equal(a.to_local(), b.to_local())
                for a, b in zip(before, trainer.model.parameters(), strict=True)
            )
            step = trainer.context.progress.step
            trainer.fit(sharding.dataset(), **fit)
            found[place, rank] = told, step, same, distance(whole(trainer.model), expected)
    return found


@pytest.mark.parametrize(
    ("micros", "model", "at", "places"),
    [
        (1, "net", (0, 0), PLACES[2:10:4]),
        (1, "net", (3, 0), PLACES),
        (2, "odd", (3, 0), ["blocks.1.a", "backward of blocks.1.norm", "loss"]),
        (2, "odd", (3, 1), ["blocks.1.a", "backward of blocks.1.norm", "on_batch"]),
        (2, "odd", (0, 1), ["blocks.2.b", "backward of blocks.0.a"]),
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
            assert told.startswith(kind) and name in told, (where, told)
            assert "planted in" in told, where
            assert step == at[0], where
            assert same, where
            assert far <= EXACT, (where, far)
