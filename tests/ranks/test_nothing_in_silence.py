"""What would go wrong in silence: weights of NaN, lost scales, state and figures that differ."""

import math
from functools import partial

import pytest
import test_alike
import tiny
import torch
from ahead import run_ahead
from test_replicas import fit
from torch.nn import functional as F

import dtrain
import dtrain.trainer
from dtrain.callbacks import (
    Checkpoint,
    ClipGradients,
    EarlyStopping,
    LossSpikeGuard,
    MixedPrecision,
    NonFiniteGuard,
)
from dtrain.checkpoint import format as files
from dtrain.errors import LossError, RankMismatch
from dtrain.testing import run_processes, run_ranks, tiny_fit, try_ranks

# ----------------------------------------------------------------------------- weights of NaN


def breaks(run_dir, epochs, step, **saves):
    """Training in which one loss is NaN, on rank 0."""

    def loss(net, batch, ctx):
        found = tiny.loss_fn(net, batch)
        if ctx.progress.step == step and net.training and dtrain.init(seed=0).rank == 0:
            found.mean = found.mean * math.nan
        return found

    net = tiny.model()
    says, made = fit(
        net,
        [ClipGradients(1.0), Checkpoint(**saves)],
        run_dir=run_dir,
        loss=loss,
        epochs=epochs,
        eval_set=tiny.dataset(16),
    )
    return [w for w in says.words if "NaN or infinite" in w], made.context.progress.step


def weights_in(folder):
    found = {}
    for saved in files.listed(folder):
        tensors = files.load_model(saved.path).values()
        found[saved.step] = all(bool(t.isfinite().all()) for t in tensors)
    return found


@pytest.mark.parametrize(
    ("size", "background"),
    [(1, False), (2, False), pytest.param(2, True, marks=pytest.mark.slow)],
)
def test_weights_of_nan_do_not_displace_finite_ones(size, background, tmp_path):
    run = run_processes if background else run_ranks
    saves = partial(breaks, every_epochs=1, keep=1, background=background)
    for _, step in run(saves, size, tmp_path, 4, 9):
        assert step == 24
    assert weights_in(tmp_path / "checkpoints") == {6: True}
    assert weights_in(tmp_path / "not-finite") == {24: False}


def test_a_new_start_goes_on_from_the_last_finite_weights(tmp_path):
    (words, _), _ = run_ranks(breaks, 2, tmp_path, 2, 9)
    assert (
        "at step 12 weights are NaN or infinite (0.weight, 0.bias, 2.weight and 1 more)"
        in (words[0])
    )
    assert f"kept aside, in {tmp_path}/not-finite" in words[0]
    (words, step), _ = run_ranks(breaks, 2, tmp_path, 4, -1)
    assert (words, step) == ([], 24)
    assert weights_in(tmp_path / "checkpoints") == {12: True, 18: True, 24: True}


def begins_broken(run_dir):
    net = tiny.model()
    net.register_buffer("mask", torch.full((2,), -math.inf))
    net.register_parameter("never", torch.nn.Parameter(torch.full((2,), math.nan), False))
    says, _ = fit(net, [Checkpoint()], run_dir=run_dir)
    return [w for w in says.words if "NaN" in w]


def test_what_was_never_finite_is_saved_as_ever(tmp_path):
    assert run_ranks(begins_broken, 2, tmp_path) == [[], []]
    assert set(weights_in(tmp_path / "checkpoints")) == {6, 12}


# ----------------------------------------------------------------------------- callbacks' state


class Counts(dtrain.Callback):
    """Keeps what differs: in ``state_dict``, or where it belongs."""

    def __init__(self, own):
        self.own, self.seen = own, torch.zeros(2)
        self.number = dtrain.init(seed=0).rank

    def on_batch(self, ctx, step):
        self.seen[0] += 1 + self.number

    def state_dict(self):
        return {} if self.own else {"seen": self.seen}

    def rank_state_dict(self):
        return {"seen": self.seen, "number": (self.number, None)} if self.own else {}

    def load_rank_state_dict(self, state):
        assert state["number"] == (self.number, None)
        self.seen = state["seen"]


class Equal(Counts):
    def __init__(self):
        super().__init__(own=False)
        self.number = 0


def counts(run_dir, own, epochs):
    callback = Counts(own)
    says, _ = fit(
        tiny.model(), [callback, Equal(), Checkpoint(every_steps=3)], run_dir=run_dir, epochs=epochs
    )
    return callback.seen.tolist(), [w for w in says.words if "state of" in w or "kept for" in w]


def test_state_that_differs_between_ranks_is_told_once_by_name(tmp_path):
    (_, words), (_, none) = run_ranks(counts, 2, tmp_path, False, 2)
    assert not none
    assert len(words) == 1
    assert "the state of Counts differs between ranks" in words[0]
    assert "rank_state_dict() and load_rank_state_dict(state)" in words[0]


def test_state_of_a_ranks_own_comes_back_on_its_rank(tmp_path):
    assert run_ranks(counts, 2, tmp_path, True, 1) == [([6.0, 0.0], []), ([12.0, 0.0], [])]
    assert run_ranks(counts, 2, tmp_path, True, 2) == [([12.0, 0.0], []), ([24.0, 0.0], [])]
    # A rank that the saved run did not have begins without.
    (first, words), (second, _), (third, _) = run_ranks(counts, 3, tmp_path, True, 3)
    assert (first, second, third) == ([18.0, 0.0], [36.0, 0.0], [18.0, 0.0])
    assert "is of 2 ranks, not of 3: of what Counts kept for each, a rank takes" in words[0]


def judges(run_dir, epochs):
    """Rank 1's value gets no better, rank 0's does."""
    number = dtrain.init(seed=0).rank
    stop = EarlyStopping(
        lambda ctx: 1.0 if number else 1.0 / (1 + ctx.progress.epoch), patience=4, vote="any"
    )
    says, made = fit(tiny.model(), [stop, Checkpoint()], run_dir=run_dir, epochs=epochs)
    return stop.bad_checks, made.context.progress.epoch, [w for w in says.words if "state of" in w]


def test_a_judgement_of_each_ranks_own_survives_a_restart(tmp_path):
    assert run_ranks(judges, 2, tmp_path / "whole", 9) == [(0, 5, []), (4, 5, [])]
    assert run_ranks(judges, 2, tmp_path / "parts", 3) == [(0, 3, []), (2, 3, [])]
    assert run_ranks(judges, 2, tmp_path / "parts", 9) == [(0, 5, []), (4, 5, [])]


# ----------------------------------------------------------------------------- figures


class Logs(dtrain.Callback):
    def __init__(self, *kinds, at=0):
        self.kinds, self.at = kinds, at

    def on_step_end(self, ctx, step):
        kind = self.kinds[dtrain.init(seed=0).rank % len(self.kinds)]
        if kind and step.number >= self.at:
            ctx.log("odd", 2.0, kind)


def logs(first, second=()):
    callbacks = [Logs(*first)]
    if second:
        callbacks.append(Logs(*second, at=3))
        callbacks[1].name = "second"
        callbacks[0].on_step_end = lambda ctx, step: (
            Logs.on_step_end(callbacks[0], ctx, step) if step.number < 3 else None
        )
    says, _ = fit(tiny.model(), callbacks, log_every=3)
    return [report.values["odd"] for report in says.reports if "odd" in report.values]


@pytest.mark.parametrize(
    "kinds", [("mean", "sum"), ("max", "mean"), ("sum", "max"), ("last", "sum")]
)
def test_a_name_that_ranks_reduce_differently_is_an_error(kinds):
    for outcome in try_ranks(logs, 2, kinds):
        assert type(outcome.error) is RankMismatch
        assert "ctx.log('odd'): the ranks reduce it differently: " in str(outcome.error)
        assert "'{}' on rank 0, '{}' on rank 1".format(*kinds) in str(outcome.error)


def test_a_name_that_is_reduced_in_another_way_later_is_an_error():
    for size in (1, 2):
        outcomes = try_ranks(logs, size, ("sum",), ("max",))
        assert all(
            "log('odd', reduce='max'): it was 'sum' before" in str(o.error) for o in outcomes
        )
    outcomes = try_ranks(logs, 2, ("sum", ""), ("", "max"))  # on the other rank
    assert all("it was 'sum' before" in str(outcome.error) for outcome in outcomes)


def test_names_that_one_rank_logs_are_reduced_as_it_says():
    assert run_ranks(logs, 2, ("sum", ""))[0] == [6.0] * 4
    assert run_ranks(logs, 2, ("", "max"))[0] == [2.0] * 4


def with_nan(size):
    """NaN on each rank in turn, in tensors that travel in the header and in larger ones."""
    world, found = dtrain.init(seed=0), []
    for count in (1, 100):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            for op in ("max", "min"):
                for rank in range(size):
                    mine = torch.arange(count).to(dtype) + world.rank
                    if world.rank == rank:
                        mine[0] = math.nan
                    got = world.comm.all_reduce("x", mine, op)
                    rest = torch.arange(count)[1:] + (size - 1 if op == "max" else 0)
                    found.append(bool(got[0].isnan()) and got[1:].tolist() == rest.tolist())
                    found.append(got.dtype == dtype)
    return found


class LogsNaN(dtrain.Callback):
    def __init__(self, rank, first):
        self.rank, self.first = rank, first

    def on_step_end(self, ctx, step):
        here = dtrain.init(seed=0).rank == self.rank
        ctx.log("most", math.nan if here and (step.number % 2 == 0) == self.first else 1.0, "max")


def logs_nan(rank, first):
    says, _ = fit(tiny.model(), [LogsNaN(rank, first)], log_every=3)
    return [r.values["most"] for r in says.reports if "most" in r.values]


def test_nan_wins_in_maxima_and_minima_of_any_size():
    for found in run_processes(with_nan, 2, 2):
        assert all(found)
    for size in (1, 3):
        assert all(all(found) for found in run_ranks(with_nan, size, size))
    for rank in range(3):
        for first in (True, False):
            assert all(map(math.isnan, run_ranks(logs_nan, 3, rank, first)[0]))


# ----------------------------------------------------------------------------- the loss scale


class Broken(torch.autograd.Function):
    """A gradient of NaN, where it is told to."""

    @staticmethod
    def forward(ctx, x, broken):
        ctx.broken = broken
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (math.nan if ctx.broken else 1.0), None


def scaled(steps, broken, init_scale=65536.0):
    def loss(net, batch, ctx):
        x, y = batch
        bad = broken(ctx.progress.step)
        return F.cross_entropy(Broken.apply(net(x), bad).float(), y)

    says, made = fit(
        tiny.model(),
        [MixedPrecision("fp16", init_scale=init_scale)],
        loss=loss,
        max_steps=steps,
        epochs=None,
        log_every=5,
        data=tiny.dataset(),
    )
    ends = [r.text for r in says.reports if r.kind == "end"]
    updates = {r.step: r.updates for r in says.reports if r.kind == "train" and r.step % 5 == 0}
    return [w for w in says.words if "overflowed" in w], ends, updates, made.precision.values()


@pytest.mark.parametrize("size", [1, 2])
def test_a_scale_that_falls_to_nothing_is_an_error(size):
    for outcome in try_ranks(scaled, size, 80, lambda step: True):
        assert isinstance(outcome.error, dtrain.DtrainError)
        assert "the loss scale has fallen to" in str(outcome.error)
        assert "in the last 30 steps in a row" in str(outcome.error)
        assert "MixedPrecision('bf16')" in str(outcome.error)
    [outcome] = try_ranks(scaled, 1, 80, lambda step: step % 2 == 0)  # never many in a row
    assert type(outcome.error) is LossError
    assert "has fallen to" in str(outcome.error)


def test_overflows_in_a_row_are_told_and_counted():
    words, ends, updates, values = run_ranks(scaled, 2, 20, lambda step: step < 12)[0]
    assert len(words) == 1
    assert "in 10 steps in a row the float16 autocast gradients overflowed" in words[0]
    assert "the loss scale is 64 now" in words[0]
    assert ends[0].startswith("finished after 20 steps (8 of them applied), ")
    assert updates == {5: 0, 10: 0, 15: 3, 20: 8}
    assert values == {"loss_scale": 16.0}
    words, ends, updates, _ = run_ranks(scaled, 1, 20, lambda step: step in (1, 2, 9))[0]
    assert (words, updates) == ([], {5: 3, 10: 7, 15: 12, 20: 17})


# ------------------------------------------------------- steps that are waited for, and others


class Skips(dtrain.Callback):
    """All ranks skip three steps, the first among them; rank 0 skips another."""

    def on_batch(self, ctx, step):
        if step.number in (0, 4, 5) or (step.number == 7 and dtrain.init(seed=0).rank == 0):
            ctx.request.skip("planted")


class Vetoes(dtrain.Callback):
    """Vetoes a step that all ranks skip, and another; one weighs nothing."""

    def on_loss(self, ctx, step):
        if step.number == 6:
            step.loss.weight = 0

    def on_grads_ready(self, ctx, step):
        if step.number in (5, 8):
            step.veto("planted")


def nan_at_nine(net, batch, ctx):
    logits = net(batch[0])
    labels = batch[1] if batch[1].dim() == 1 else batch[1].argmax(-1)
    mean = F.cross_entropy(logits, labels)
    if ctx.progress.step == 9 and net.training and dtrain.init(seed=0).rank == 0:
        mean = mean * math.nan
    return dtrain.Loss(mean, outputs=logits)


MODES = {name: (make, None) for name, make in test_alike.CALLBACKS.items()} | {
    "spikes": (lambda: LossSpikeGuard(1e-3, window=2, patience=3), nan_at_nine),
    "guard": (lambda: NonFiniteGuard("skip"), nan_at_nine),
    "guard that tells": (lambda: NonFiniteGuard("ignore"), nan_at_nine),
    "fp16": (lambda: MixedPrecision("fp16", init_scale=2.0**19, growth_interval=2), None),
}
del MODES["Checkpoint"], MODES["Profile"]  # which change nothing


def in_a_mode(names, *, waits):
    run_ahead(not waits)
    told = {}
    for name in names:
        make, loss = MODES[name]
        callback = make()
        fit = tiny_fit(
            [callback, Skips(), Vetoes()],
            epochs=3,
            log_every=4,
            loss_fn=loss,
            optimizer=lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True),
        )
        rows = [
            {k: v for k, v in row.items() if not k.startswith(test_alike.TIMED)}
            for row in fit.result.history
        ]
        weights = {key: tensor.flatten().tolist() for key, tensor in fit.weights.items()}
        words = (fit.result.updates, fit.result.stop_reason, callback.state_dict())
        told[name] = [repr(part) for part in (fit.applied, words)], (fit.losses, rows, weights)
    return told


@pytest.mark.parametrize("size", [1, 2])
def test_callbacks_decide_alike_whether_steps_are_waited_for(size, monkeypatch):
    run_ahead(False, monkeypatch)  # undone by it
    waited, not_waited = (
        run_ranks(partial(in_a_mode, waits=waits), size, [*MODES]) for waits in (True, False)
    )
    for one, other in zip(waited, not_waited, strict=True):
        for name in MODES:
            (told, (losses, rows, weights)), (others, its) = one[name], other[name]
            other_losses, other_rows, other_weights = its
            assert told == others, name
            # A rank alone adds them up in 64 bits, where the device would in 32.
            assert losses == pytest.approx(other_losses, rel=1e-6, nan_ok=True), name
            # Where a step is not waited for, the optimizer divides instead of the clipping.
            for key, values in weights.items():
                assert values == pytest.approx(
                    other_weights[key], rel=1e-5, abs=1e-6, nan_ok=True
                ), (name, key)
            for row, other_row in zip(rows, other_rows, strict=True):
                assert row == pytest.approx(other_row, rel=1e-6, nan_ok=True), name


def test_a_step_that_all_ranks_skip_is_no_spike():
    def run():
        guard = LossSpikeGuard(1e6, window=2, patience=2)
        made = tiny.trainer([guard, Skips()])
        result = made.fit(tiny.dataset(), batch_size=16, epochs=2)
        return result.steps, guard.spikes_in_a_row, result.stop_reason

    assert run_ranks(run, 2) == [(12, 0, "all epochs done")] * 2
