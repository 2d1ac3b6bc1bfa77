"""Callbacks on an accelerator, for which the CPU stands in: guards decide there, nobody waits."""

from functools import partial

import pytest
import tiny
import torch
from ahead import run_ahead
from torch import nn
from torch.nn import functional as F

import dtrain
from dtrain.callbacks import (
    EMA,
    ClipGradients,
    GradientStats,
    LossSpikeGuard,
    NonFiniteGuard,
    StochasticWeightAveraging,
)
from dtrain.testing import run_ranks


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()


def dataset():
    x, y = tiny.dataset(96).tensors
    x = x.double()
    x[40:44] = float("nan")  # in steps 2 and 3 of an epoch of 6, not shuffled
    return torch.utils.data.TensorDataset(x, y)


def loss_fn(net, batch, ctx):
    loss = F.cross_entropy(net(batch[0]), batch[1])
    return loss * 1e4 if ctx.progress.step == 10 else loss


def train(make, *, ahead, strategy="flat", loss=loss_fn, max_steps=None):
    run_ahead(ahead)
    dtrain.init(seed=0)
    callbacks = make()
    trainer = dtrain.Trainer(
        net(),
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
        loss,
        callbacks=callbacks,
        sinks=[],
        strategy=strategy,
    )
    result = trainer.fit(
        dtrain.Data(dataset(), 16, shuffle=False), epochs=3, log_every=4, max_steps=max_steps
    )
    state = {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()}
    told = [(c.name, c.state_dict()) for c in callbacks]
    return (
        state,
        repr(told),
        result.steps,
        result.updates,
        [
            {key: row[key] for key in ("step", "vetoed", "grad_norm") if key in row}
            for row in result.history
        ],
    )


GUARDS = {
    "non-finite": lambda: [NonFiniteGuard("skip")],
    "spikes": lambda: [LossSpikeGuard(window=4, patience=None)],
    "both, and averages": lambda: [
        LossSpikeGuard(window=4, patience=None),
        EMA(0.5),
        StochasticWeightAveraging(1, every_steps=2),
        ClipGradients(0.2),
        GradientStats(every=2),
        NonFiniteGuard("skip"),
    ],
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", GUARDS)
@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_steps_are_left_out_alike(monkeypatch, case, size, strategy):
    """With buffers as before the step: the NaN is in BatchNorm's statistics by then."""
    run_ahead(False, monkeypatch)  # undone by it
    waited, ahead = (
        run_ranks(partial(train, GUARDS[case], ahead=ahead, strategy=strategy), size)
        for ahead in (False, True)
    )
    for one, other in zip(waited, ahead, strict=True):
        state, told, *counts, rows = one
        other_state, other_told, *other_counts, other_rows = other
        assert counts == other_counts
        if case == "non-finite":  # a spike's statistics stay, and the NaN in them
            assert all(torch.tensor(value).isfinite().all() for value in other_state.values())
        for name, value in state.items():
            pair = torch.tensor(other_state[name]), torch.tensor(value)
            assert torch.allclose(*pair, rtol=1e-9, equal_nan=True), name
        assert [row.get("vetoed") for row in rows] == [row.get("vetoed") for row in other_rows]
        if case != "both, and averages":
            assert told == other_told


def test_a_stop_names_the_module_a_step_later(monkeypatch):
    run_ahead(False, monkeypatch)

    def stopped(ahead):
        run_ahead(ahead)
        dtrain.init(seed=0)
        trainer = dtrain.Trainer(
            net(),
            lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
            loss_fn,
            callbacks=[NonFiniteGuard("stop")],
            sinks=[],
        )
        result = trainer.fit(dtrain.Data(dataset(), 16, shuffle=False), epochs=3)
        return result.steps, result.stop_reason

    (steps, why), (late, told) = (run_ranks(partial(stopped, one), 2)[0] for one in (False, True))
    assert "rank 1, micro-batch 0: the loss is NaN; the batch holds NaN values; first NaN" in why
    assert told == why
    assert 0 < late - steps <= 2


def test_who_looks_without_asking_finds_gradients_clipped(monkeypatch):
    """Also a subclass of a callback that asks, which has an ``on_grads_ready`` of its own."""
    run_ahead(patch=monkeypatch)
    seen = []

    class Looks(dtrain.Callback):
        def on_grads_ready(self, ctx, step):
            seen.append(torch.cat([p.grad.reshape(-1) for p in ctx.model.parameters()]).norm())

    class ClipsAndLooks(ClipGradients):
        def on_grads_ready(self, ctx, step):
            super().on_grads_ready(ctx, step)
            Looks.on_grads_ready(self, ctx, step)

    assert ClipGradients.asks_for_gradients
    assert not ClipsAndLooks.asks_for_gradients
    for callbacks in ([ClipGradients(1e-3), Looks()], [ClipsAndLooks(1e-3)]):
        dtrain.init(seed=0)
        dtrain.Trainer(
            net().float(),
            lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
            lambda net, batch: F.cross_entropy(net(batch[0].float()), batch[1]),
            callbacks=callbacks,
            sinks=[],
        ).fit(tiny.dataset(64), batch_size=16, epochs=1)
        assert seen
        assert [float(norm) for norm in seen] == pytest.approx([1e-3] * len(seen), rel=1e-2)
        seen.clear()


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_of_16_bits_are_clipped_on_their_way(monkeypatch, size):
    """The norm has 16 bits then, and a fused optimizer takes 32."""
    run_ahead(False, monkeypatch)

    def clipped(ahead):
        run_ahead(ahead)
        dtrain.init(seed=0)
        torch.manual_seed(0)
        trainer = dtrain.Trainer(
            nn.Linear(8, 2).bfloat16(),
            lambda model: torch.optim.SGD(model.parameters(), lr=1.0, fused=True),
            lambda net, batch: F.cross_entropy(net(batch[0].bfloat16()).float(), batch[1]),
            callbacks=[ClipGradients(0.1)],
            sinks=[],
        )
        trainer.fit(tiny.dataset(72), batch_size=16, epochs=2)  # the last batch is ragged
        return trainer.model.weight.detach()

    waited, ahead = (run_ranks(partial(clipped, one), size)[0] for one in (False, True))
    torch.testing.assert_close(waited, ahead, atol=0.02, rtol=0.02)


def test_who_asks_finds_them_clipped_too_and_what_it_changes_counts(monkeypatch):
    run_ahead(patch=monkeypatch)

    class Zeroes(dtrain.Callback):
        asks_for_gradients = True

        def on_grads_ready(self, ctx, step):
            assert float(ctx.gradient_norm()) == pytest.approx(1e-3, rel=1e-2)
            for grad in ctx.gradients():
                grad.zero_()
            assert float(ctx.gradient_norm()) == 0

    torch.manual_seed(0)
    model = nn.Linear(8, 2)
    before = model.weight.detach().clone()
    dtrain.Trainer(
        model,
        lambda model: torch.optim.SGD(model.parameters(), lr=1.0, fused=True),
        lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
        callbacks=[ClipGradients(1e-3), Zeroes()],
        sinks=[],
    ).fit(tiny.dataset(64), batch_size=16, epochs=1)
    assert torch.equal(model.weight, before)
