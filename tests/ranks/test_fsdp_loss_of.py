"""`ctx.loss_of` where the model is sharded: all ranks call it, whoever has a batch."""

import pytest
import sharding
import torch
from sharding import loss_fn, strategy_of

import dtrain
from dtrain.testing import run_outcomes, run_processes

EVERY = 3  # batches that are looked at after a step, one by each rank in turn


def batch_of(number):
    return next(iter(torch.utils.data.DataLoader(sharding.dataset(), 2 + number)))


class Looks(dtrain.Callback):
    """Asks after each step for the loss of several batches, one of which is this rank's."""

    def __init__(self, where="on_step_end", bad=None):
        self.seen, self.where, self.bad = {}, where, bad

    def on_step_end(self, ctx, step):
        for turn in range(0, EVERY, ctx.data_size):  # with three ranks or two, some have none
            mine = turn + ctx.data_rank
            batch = batch_of(mine) if mine < EVERY else None
            found = ctx.loss_of("none" if mine == self.bad else batch)
            assert (found.weight == 0) == (batch is None)
            if batch is not None:
                self.seen[step.number, mine] = float(found.mean.detach())
                assert not found.mean.requires_grad or not ctx.sharded

    def on_loss(self, ctx, step):
        if self.where == "on_loss":
            ctx.loss_of(step.batch)


def train(strategy, where="on_step_end", bad=None):
    dtrain.init(seed=0)
    torch.manual_seed(1)
    model = sharding.Net().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    looks = Looks(where, bad)
    trainer = dtrain.Trainer(
        model, optimizer, loss_fn, callbacks=[looks], sinks=[], strategy=strategy_of(strategy)
    )
    trainer.fit(sharding.dataset(), batch_size=6, epochs=1)
    return looks.seen


@pytest.mark.parametrize("size", [2, 3])
def test_losses_are_those_of_one_process_and_a_rank_may_have_none(size):
    (truth,) = run_processes(train, 1, "flat", timeout_s=60)
    ranks = run_processes(train, size, "fsdp", timeout_s=60)
    found = {key: value for seen in ranks for key, value in seen.items()}
    assert found.keys() == truth.keys()
    assert found == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize(
    ("where", "bad", "words"),
    [("on_step_end", 1, "str"), ("on_loss", None, "ctx.loss_of cannot be called in a loss func")],
)
def test_what_fails_in_it_is_known_to_all(where, bad, words):
    told = [str(one) for one in run_outcomes(train, 2, "fsdp", where, bad, timeout_s=60)]
    assert all(words in one for one in told), told
