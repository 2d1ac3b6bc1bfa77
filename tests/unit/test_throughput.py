"""Shares of a step's time on an accelerator; the host's figures: tests/ranks/test_watching.py."""

import pytest
import torch
from stand_in import StandIn
from torch import nn
from torch.utils.data import Dataset

import dtrain
from dtrain.callbacks import GradientAccumulation
from dtrain.callbacks.throughput import PHASES, Throughput


class Timed(StandIn):
    """Its time goes by where a test says so; what was recorded is there two steps later."""

    def __init__(self):
        super().__init__()
        self.now, self.steps, self.timed = 0.0, 0, 0

    def event(self, *, timed=False):
        event = super().event(timed=timed)
        if timed:
            self.timed += 1
            record = event.record

            def recorded():
                record()
                event.at, event.step = self.now, self.steps

            def waited():
                assert self.steps == event.step + 2

            event.record, event.synchronize = recorded, waited
            event.elapsed_time = lambda end: end.at - event.at
        return event


class Slow(Dataset):
    def __init__(self, card):
        self._card = card

    def __len__(self):
        return 400

    def __getitem__(self, row):
        self._card.now += 0.75 if row >= 40 else 0.25
        return torch.ones(3)


def shares(card, callbacks=(), broken=-1, count_flops=False, **options):
    """Returns those of each report; a step takes 1 (from step 10 on 3), 2, 3 and 4 milliseconds."""
    dtrain.init(seed=0)

    class Passes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            card.now += 3.0
            return grad

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            card.now += 4.0
            super().step()

    class Ends(dtrain.Callback):
        def on_step_end(self, ctx, step):
            card.steps += 1
            card.now += 1000.0  # between steps

    def loss(model, batch, ctx):
        if ctx.progress.step == broken:
            raise ValueError("planted")
        card.now += 2.0
        return Passes.apply(model(batch)).mean()

    trainer = dtrain.Trainer(
        nn.Linear(3, 1),
        lambda net: Optimizer(net.parameters(), 0.1),
        loss,
        callbacks=[Throughput(count_flops=count_flops), *callbacks, Ends()],
        sinks=[],
    )
    data = dtrain.Data(Slow(card), 4, shuffle=False)
    if broken >= 0:
        with pytest.raises(ValueError, match="planted"):
            trainer.fit(data, **options)
        broken = -1
    result = trainer.fit(data, **options)
    rows = [row for row in result.history if "train/loss" in row]
    return [
        [row[name] for phase in PHASES if (name := f"throughput/{phase}_share") in row]
        for row in rows
    ]


@pytest.fixture
def card(monkeypatch):
    return Timed().install(monkeypatch)


def test_a_step_in_ten_is_timed_where_it_is_computed(card):
    first, later = [0.1, 0.2, 0.3, 0.4], [3 / 12, 2 / 12, 3 / 12, 4 / 12]
    found = shares(card, max_steps=28, log_every=3)
    # Step 1 is read after step 3, step 11 after 13, step 21 after 23.
    assert found[0] == []
    assert found[1:] == [*[pytest.approx(first)] * 3, *[pytest.approx(later)] * 6]
    assert card.timed == 5


def test_several_of_them_are_added_up_until_they_are_reported(card):
    both = [4 / 22, 4 / 22, 6 / 22, 8 / 22]
    assert shares(card, max_steps=14, log_every=14) == [pytest.approx(both)]


def test_each_micro_batch_is_timed(card):
    found = shares(card, [GradientAccumulation(steps=2)], max_steps=4, log_every=4)
    assert found == [pytest.approx([1 / 15, 4 / 15, 6 / 15, 4 / 15])]
    assert card.timed == 8


def test_a_fit_that_failed_leaves_nothing_half_timed(card):
    timed = [pytest.approx([0.1, 0.2, 0.3, 0.4])]
    assert shares(card, broken=1, max_steps=6, log_every=6) == timed
    assert shares(card, broken=2, max_steps=6, log_every=6) == [[]]  # step 1 came before it


def test_the_step_whose_operations_are_counted_is_not_timed(card):
    class Skip(dtrain.Callback):
        def on_batch(self, ctx, step):
            if step.number == 0:
                ctx.request.skip("planted")

    found = shares(card, [Skip()], max_steps=16, log_every=8, count_flops=True)
    assert found == [[], pytest.approx([3 / 12, 2 / 12, 3 / 12, 4 / 12])]
