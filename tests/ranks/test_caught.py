"""One rank fails, wherever that is; the script catches it on all ranks, and fits again."""

import re

import pytest
import tiny
import torch

import dtrain
from dtrain.testing import run_outcomes, run_processes, run_ranks

HOOKS = ["on_step_start", "on_grads_ready", "on_step_end", "on_epoch_end", "on_eval_end"]
PLACES = [*HOOKS, "loss_fn", "update", "on_step_end at an epoch's end"]


class Fails(dtrain.Callback):
    """Fails once on rank 1, in one hook."""

    def __init__(self, where):
        self.where, _, at_the_end = where.partition(" at ")
        self.step = 3 if at_the_end else 1
        self.armed = dtrain.init(seed=0).rank == 1

    def fail(self, where, step=None):
        if self.armed and where == self.where and step in (None, self.step):
            self.armed = False
            raise RuntimeError(f"out of memory in {where}")

    def on_step_start(self, ctx, step):
        self.fail("on_step_start", step.number)

    def on_grads_ready(self, ctx, step):
        self.fail("on_grads_ready", step.number)

    def on_step_end(self, ctx, step):
        self.fail("on_step_end", step.number)

    def on_epoch_end(self, ctx):
        self.fail("on_epoch_end")

    def on_eval_end(self, ctx, metrics):
        self.fail("on_eval_end")


class FailingSGD(torch.optim.SGD):
    fails = None

    def step(self, *args):
        if self.fails is not None:
            self.fails.fail("update")
        super().step(*args)


def trainer_that_fails(where, strategy, more=()):
    fails, net = Fails(where), tiny.model()

    def loss(net, batch, ctx):
        fails.fail("loss_fn", ctx.progress.step)
        return tiny.loss_fn(net, batch)

    optimizer = FailingSGD(net.parameters(), lr=0.1)
    optimizer.fails = fails
    callbacks = [fails, *more]
    return dtrain.Trainer(net, optimizer, loss, callbacks=callbacks, sinks=[], strategy=strategy)


def caught(where, strategy):
    dtrain.init(seed=0)
    trainer, told = trainer_that_fails(where, strategy), []
    fit = {"batch_size": 8, "epochs": 2, "eval_set": tiny.dataset(16)}
    try:
        trainer.fit(tiny.dataset(32), **fit)
    except (RuntimeError, dtrain.RemoteError) as error:
        told.append(f"{type(error).__name__}: {error}")
    try:
        told.append(trainer.fit(tiny.dataset(32), **fit).steps)
    except dtrain.ConfigError as error:
        told.append(str(error))
    net = tiny.model()
    again = dtrain.Trainer(net, tiny.adam, tiny.loss_fn, sinks=[], strategy=strategy)
    told.append(again.fit(tiny.dataset(32), **fit).steps)
    return told, tiny.digest(net)


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
@pytest.mark.parametrize("where", PLACES)
def test_all_ranks_get_the_error_and_the_next_fit_works(where, strategy):
    found = run_ranks(caught, 3, where, strategy)
    told = [told for told, _ in found]
    hook, _, at_the_end = where.partition(" at ")
    assert told[1][0] == f"RuntimeError: out of memory in {hook}"
    step = (
        3 if at_the_end or hook in ("on_epoch_end", "on_eval_end") else 0 if hook == "update" else 1
    )
    for rank in (0, 2):
        assert told[rank][0].startswith("RemoteError: rank 1 on ")
        assert f" failed in {hook} at step {step}: RuntimeError: out of memory" in told[rank][0]
    assert told[0][1:] == told[1][1:] == told[2][1:]
    if hook in ("on_grads_ready", "on_step_end", "update"):  # where the ranks may differ since
        assert told[0][1].startswith("a callback or the optimizer failed on one rank")
    else:
        assert told[0][1] == 8
    assert told[0][2] == 8
    assert len({digest for _, digest in found}) == 1


@pytest.mark.parametrize("where", ["on_step_end", "on_grads_ready"])
def test_on_real_ranks_too(where):
    found = run_processes(caught, 2, where, "ddp")
    assert found[0][0][0].startswith("RemoteError: rank 1 on ")
    assert found[1][0][0] == f"RuntimeError: out of memory in {where}"
    assert found[0][0][1:] == found[1][0][1:]
    assert found[0][1] == found[1][1]


def not_caught(where):
    dtrain.init(seed=0)
    trainer_that_fails(where, "flat").fit(tiny.dataset(32), batch_size=8, epochs=2)


@pytest.mark.parametrize("where", ["on_step_end", "update", "loss_fn"])
def test_who_failed_is_not_told_that_those_are_gone_who_left_for_it(where):
    first, second = run_outcomes(not_caught, 2, where)
    assert str(second.error) == f"out of memory in {where}"
    assert type(second.error) is RuntimeError
    assert type(first.error) is dtrain.RemoteError


class Meets(dtrain.Callback):
    """In every hook of a step all ranks meet, once the callback before it has been called."""

    def on_step_start(self, ctx, step):
        ctx.comm.barrier("step start")

    def on_loss(self, ctx, step):
        ctx.comm.barrier("loss")

    def on_grads_ready(self, ctx, step):
        ctx.comm.barrier("grads")

    def on_step_end(self, ctx, step):
        ctx.comm.barrier("step end")


def caught_beside_verbs(where, strategy):
    """The others wait in a verb that the failing rank does not come to."""
    dtrain.init(seed=0)
    told = []
    trainer = trainer_that_fails(where, strategy, more=[Meets()])
    try:
        trainer.fit(tiny.dataset(32), batch_size=8, epochs=1)
    except (RuntimeError, dtrain.RemoteError) as error:
        told.append(f"{type(error).__name__}: {error}")
    net = tiny.model()
    again = dtrain.Trainer(net, tiny.adam, tiny.loss_fn, callbacks=[Meets()], sinks=[])
    told.append(again.fit(tiny.dataset(32), batch_size=8, epochs=1).steps)
    return told


@pytest.mark.parametrize(("where", "strategy"), [("loss_fn", "ddp"), ("on_grads_ready", "flat")])
def test_a_failure_before_a_verb_of_all_ranks_reaches_them_in_it(where, strategy):
    one, two, three = run_processes(caught_beside_verbs, 3, where, strategy)
    assert two == [f"RuntimeError: out of memory in {where}", 4]
    for told in (one, three):
        assert re.match(rf"RemoteError: rank 1 on \S+ failed in {where} at step 1: Runt", told[0])
        assert told[1] == 4


def alone():
    dtrain.init(seed=0)
    steps = []

    class Counts(dtrain.Callback):
        def on_step_start(self, ctx, step):
            steps.append(step.number)

        def on_step_end(self, ctx, step):
            if step.number == 1:
                raise ValueError("here and now")

    trainer = tiny.trainer([Counts()])
    with pytest.raises(ValueError, match="here and now"):
        trainer.fit(tiny.dataset(32), batch_size=8, epochs=1)
    return steps


def test_a_rank_that_is_alone_raises_at_once():
    assert run_ranks(alone, 1) == [[0, 1]]
