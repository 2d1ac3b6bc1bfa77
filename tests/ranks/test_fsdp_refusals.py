"""What a sharded model cannot do in the middle of a step, each said in words, on all ranks."""

import copy

import pytest
import sharding
import torch
from sharding import distance, loss_fn, strategy_of, whole
from torch import nn

import dtrain
from dtrain.errors import ConfigError, RemoteError
from dtrain.strategies import FSDP
from dtrain.testing import run_processes

EXACT = 1e-12


def of_inputs(model, x, found=None):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return grad.square().mean()


def of_what_is_hidden(model, x, found=None):
    hidden = model.first(x)
    (grad,) = torch.autograd.grad(model.blocks[1](hidden).sum(), hidden)
    return model.blocks[2](grad.detach()).mean()


def jvp(model, x, found=None):
    return torch.autograd.functional.jvp(model, x, torch.ones_like(x), create_graph=True)[1].mean()


def by_hand(model, x, found):
    found.mean.backward()
    return 0.0


PENALTIES = {"of inputs": of_inputs, "hidden": of_what_is_hidden, "jvp": jvp, "by hand": by_hand}


def penalised(name, micros, reshard, on=None, at=0):
    """Trains with a penalty from some step on; and then without."""
    rank = dtrain.init(seed=0).rank
    penalises = [on in (None, rank)]

    def loss(model, batch):
        found = loss_fn(model, batch)
        if penalises[0] and trainer.context.progress.step >= at:
            found.mean = found.mean + PENALTIES[name](model, batch[0], found)
        return found

    trainer = sharding.trainer(FSDP(reshard=reshard), loss=loss, micros=micros)
    try:
        trainer.fit(sharding.dataset(), batch_size=6, epochs=2)
        told = "nothing"
    except (ConfigError, RemoteError) as error:
        told = str(error)
    step, penalises[0] = trainer.context.progress.step, False
    trainer.fit(sharding.dataset(), batch_size=6, epochs=2)
    return told, step == at, whole(trainer.model)


def evaluated_with_gradients():
    def eval_fn(model, batch):
        with torch.enable_grad():
            return dtrain.Metrics({"slope": of_inputs(model, batch[0]).detach()})

    trainer = sharding.trainer(FSDP(), eval_fn=eval_fn)
    try:
        trainer.evaluate(sharding.dataset(5), batch_size=4)
    except (ConfigError, RemoteError) as error:
        return str(error)
    return "nothing"


class Copies(dtrain.Callback):
    def on_fit_start(self, ctx):
        self.copied = copy.deepcopy(ctx.model)


def tries():
    dtrain.init(seed=0)
    straight = sharding.trainer(FSDP())
    straight.fit(sharding.dataset(), batch_size=6, epochs=2)
    expected = whole(straight.model)
    cases = [(name, 1, True) for name in ("hidden", "jvp", "by hand")]
    cases += [("of inputs", 2, False), ("by hand", 2, True, 1, 3)]
    told = []
    for case in cases:
        words, here, found = penalised(*case)
        told.append((case, words, here, distance(found, expected)))
    copied = []
    for callbacks in ([Copies()], []):
        trainer = sharding.trainer(FSDP(), callbacks=callbacks)
        try:
            trainer.fit(sharding.dataset(), batch_size=6, max_steps=1)
            copy.deepcopy(trainer.model)
        except ConfigError as error:
            copied.append(str(error))
    model, _ = sharding.make()
    model.norm = nn.SyncBatchNorm(3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"in norm \(SyncBatchNorm\)\. Use GroupNorm"):
        sharding.trainer(FSDP(), net=(model, optimizer))
    return told, copied, evaluated_with_gradients()


def test_gradients_through_it_in_a_loss_and_copies_are_refused_and_fit_goes_on():
    for told, copied, evaluated in run_processes(tries, 2):
        for case, words, here, far in told:
            assert "took a gradient through the model" in words, (case, words)
            assert here, case
            assert far <= EXACT, (case, far)
        assert len(copied) == 2
        assert all("a model in shards cannot be copied" in words for words in copied)
        assert "took a gradient through the model" in evaluated


def of_the_head(strategy):
    """A penalty of what is in no block needs no block's parameters again."""
    dtrain.init(seed=0)

    def loss(model, batch):
        found = loss_fn(model, batch)
        grads = torch.autograd.grad(found.mean, [*model.head.parameters()], create_graph=True)
        found.mean = found.mean + sum(grad.square().sum() for grad in grads)
        return found

    trainer = sharding.trainer(strategy_of(strategy), loss=loss)
    trainer.fit(sharding.dataset(), batch_size=6, epochs=2)
    return whole(trainer.model)


def heads():
    return of_the_head("flat"), of_the_head("fsdp")


def test_a_gradient_that_comes_to_no_block_is_exact():
    for expected, found in run_processes(heads, 2):
        assert distance(found, expected) <= EXACT
