"""Guards: the origin is named, all ranks decide alike, and a step left out changes nothing."""

import copy
import hashlib
import json
import math
import os

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

import dtrain
from dtrain.callbacks import Checkpoint, ClipGradients, GradientAccumulation, MixedPrecision
from dtrain.callbacks.loss_spike_guard import LossSpikeGuard
from dtrain.callbacks.non_finite_guard import NonFiniteGuard
from dtrain.callbacks.overfit_batches import OverfitBatches
from dtrain.callbacks.time_limit import TimeLimit, parse_duration
from dtrain.errors import ConfigError
from dtrain.testing import run_outcomes, run_processes

BATCH = 24
STEPS = 8

# -- NonFiniteGuard: what may go wrong, and a model in which it does ----------------------------


class Fragile(nn.Module):
    """Gives NaN, or a gradient of NaN, or NaN by chance, where a value of the batch says so."""

    def forward(self, x):
        sign = x[0, 0].item()
        if sign == 111:
            return x / 0 * 0
        if sign == 222:
            return x + torch.sqrt(x * 0) * 0  # finite; its gradient is infinity times 0
        if sign == 333:
            lucky = torch.rand(1) > 0.5
            return x / lucky * lucky
        if sign == 555:
            return x / 0  # infinite, until Tanh makes it 1; its gradient is NaN
        return x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.Sequential(Fragile(), nn.Linear(8, 16), nn.Tanh())
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        # Fragile first sees the batch's sign, then what has a gradient.
        return self.head(self.drop(self.norm(self.encoder[2](self.fragile(x)))))

    def fragile(self, x):
        hidden = self.encoder[1](x)
        hidden = torch.cat([x[:, :1].detach(), hidden], 1)
        return self.encoder[0](hidden)[:, 1:]


def loss_fn(net, batch, ctx):
    x, y = batch
    loss = F.cross_entropy(net(x), y)
    ctx.log("seen", 1, "sum")
    if x[0, 0] == 444:
        loss = loss * math.inf
    return loss


class Plant(dtrain.Callback):
    """Spoils one rank's micro-batch of one step (or several), or a parameter."""

    def __init__(self, rank, steps, micro, sign, name="Plant"):
        self.name = name
        self.mine = dtrain.init(seed=0).rank == rank or rank == "all"
        self.steps, self.micro, self.sign = steps, micro, sign

    def on_step_start(self, ctx, step):
        if self.sign == "parameter" and self.mine and step.number in self.steps:
            with torch.no_grad():
                ctx.model.head.weight[0, 1] = math.nan

    def on_batch(self, ctx, step):
        if self.mine and step.number in self.steps and step.micro == self.micro:
            x, y = copy.deepcopy(step.batch)
            if isinstance(self.sign, int):
                x[0, 0] = self.sign
            if self.sign == "batch":
                x[1, 2] = math.nan
            step.batch = x, y

    def on_grads_ready(self, ctx, step):
        if self.sign == "gradient" and step.number in self.steps:
            ctx.model.head.bias.grad[0] = math.inf


def state_of(ctx):
    """A digest of parameters, buffers and optimizer state."""
    sha = hashlib.sha256(tiny.digest(ctx.model).encode())
    for one in ctx.optimizer.state_dict()["state"].values():
        for value in one.values():
            sha.update(torch.as_tensor(value).double().numpy().tobytes())
    return sha.hexdigest()


class Watch(dtrain.Callback):
    """Comes first: compares what is before a step, before the guard, and after the step."""

    clips = False

    def on_fit_start(self, ctx):
        self.unchanged, self.vetoed, self.said, self.losses = [], [], [], []

    def on_step_start(self, ctx, step):
        self.before = state_of(ctx)

    def on_grads_ready(self, ctx, step):
        self.streams = torch.get_rng_state(), ctx.rng.get_state(), ctx.shared_rng.get_state()
        self.grads = {name: p.grad.clone() for name, p in ctx.model.named_parameters()}

    def on_step_end(self, ctx, step):
        if state_of(ctx) == self.before:
            self.unchanged.append(step.number)
        if step.vetoed:
            self.vetoed.append((step.number, step.vetoed))
        said = [note for note in ctx._outbox.notes if note.startswith("warning: step")]
        self.said += [note for note in said if note not in self.said]
        self.losses.append(step.loss_mean)
        streams = torch.get_rng_state(), ctx.rng.get_state(), ctx.shared_rng.get_state()
        assert all(torch.equal(a, b) for a, b in zip(streams, self.streams, strict=True))
        for name, p in ctx.model.named_parameters():
            ours = torch.nan_to_num(p.grad, nan=7.0)
            if name != "head.bias" and not self.clips:  # which Plant may have spoilt since
                assert torch.equal(ours, torch.nan_to_num(self.grads[name], nan=7.0))
        # A replay leaves no hook behind, and logs nothing twice.
        assert not any(module._forward_hooks for module in ctx.model.modules())


def run(plants, guard, *, callbacks=(), net=None, steps=STEPS, seen=None, check_ranks=True):
    watch = Watch()
    watch.clips = any(isinstance(one, ClipGradients) for one in callbacks)
    dtrain.init(seed=0)
    trainer = dtrain.Trainer(
        net or Net(),
        tiny.adam,
        loss_fn,
        callbacks=[watch, *plants, GradientAccumulation(steps=2), *callbacks, guard],
        sinks=[],
        check_ranks=check_ranks,
    )
    result = trainer.fit(tiny.dataset(), batch_size=BATCH, max_steps=steps, log_every=100)
    micros = 2 * trainer.world.size
    assert sum(row["seen"] for row in result.history) == micros * result.steps
    return watch, result, trainer


def origins():
    """Trouble of every kind, on the last rank; returns what the guard says of it."""
    world = dtrain.init(seed=0)
    last = world.size - 1
    found = {}
    for kind, micro, sign in (
        ("loss", 1, 111),
        ("gradient", 0, 222),
        ("loss function", 1, 444),
        ("batch", 1, "batch"),
        ("infinite", 0, 555),
        ("another callback", 0, "gradient"),
    ):
        watch, result, trainer = run([Plant(last, [3], micro, sign)], NonFiniteGuard("skip"))
        assert watch.unchanged == [3]
        assert result.steps == STEPS
        assert trainer.context.progress.updates == STEPS - 1
        assert all(t.isfinite().all() for t in trainer.model.state_dict().values())
        ((number, why),) = watch.vetoed
        assert number == 3
        found[kind] = why

    # A parameter of one rank's: nothing mends it, so the run ends.
    plants = [Plant(last, [2], 0, "parameter")]
    watch, result, _ = run(plants, NonFiniteGuard("stop"), check_ranks=False)
    assert [number for number, _ in watch.vetoed] == [2, 3]
    assert result.steps == 4
    assert result.stop_reason == watch.vetoed[0][1]
    found["parameter"] = watch.vetoed[0][1]

    # What chance did, chance does again: the replay draws the same numbers.
    chance = [Plant("all", range(1, STEPS), 0, 333)]
    watch, result, _ = run(chance, NonFiniteGuard("skip", patience=None))
    assert 1 <= len(watch.vetoed) < STEPS
    assert all("'encoder.0' (Fragile)" in why for _, why in watch.vetoed)
    return found


def decisions():
    """The actions, and what they do to the rest of the run."""
    last = dtrain.init(seed=0).size - 1
    plants = [Plant(last, [2], 0, 111), Plant(0, [5, 6, 7], 0, 222, "Second")]
    watch, result, _ = run(plants, NonFiniteGuard("stop"))
    assert [number for number, _ in watch.vetoed] == [2]
    assert result.steps == 4  # asked after the reduction of step 2, so step 3 is the last
    assert result.stop_reason == watch.vetoed[0][1]

    watch, result, _ = run(plants, NonFiniteGuard("skip", patience=2))
    assert [number for number, _ in watch.vetoed] == [2, 5, 6, 7]
    assert result.steps == 8
    assert result.stop_reason.startswith("step 6: ")

    watch, result, trainer = run(plants, NonFiniteGuard("ignore"))
    assert not watch.vetoed
    assert result.steps == STEPS
    assert len(watch.said) == 1  # once in a row; from then on all is NaN
    assert watch.said[0].startswith("warning: step 2: ")
    assert not torch.isfinite(trainer.model.head.weight).any()

    # Without trouble, the guard changes nothing. Weight 0 is no trouble, even if it is NaN.
    class Nothing(dtrain.Callback):
        def on_loss(self, ctx, step):
            if step.number == 4 and step.micro == 0:
                step.loss = dtrain.Loss(step.loss.mean * math.nan, weight=0)

    plain, _, without = run([], Nothing())
    watch, _, guarded = run([], NonFiniteGuard("stop"), callbacks=[Nothing()])
    assert watch.losses == plain.losses
    assert not watch.vetoed
    assert tiny.digest(guarded.model) == tiny.digest(without.model)

    # A step that is left out is as if it had been vetoed by hand, in all that follows.
    class Veto(dtrain.Callback):
        def on_step_start(self, ctx, step):
            self.buffers = [buffer.clone() for buffer in ctx.model.buffers()]

        def on_grads_ready(self, ctx, step):
            if step.number == 3:
                step.veto("by hand")
                for buffer, kept in zip(ctx.model.buffers(), self.buffers, strict=True):
                    buffer.copy_(kept)

    plant = [Plant("all", [3], 0, 222)]
    _, _, by_hand = run(plant, Veto())
    _, _, guarded = run(plant, NonFiniteGuard("skip"))
    assert tiny.digest(by_hand.model) == tiny.digest(guarded.model)

    # Clipping before it in the list spoils no finding.
    watch, _, _ = run(plants[1:], NonFiniteGuard("skip"), callbacks=[ClipGradients(1.0)])
    assert "its gradient is not: 'encoder.1" in watch.vetoed[0][1]

    # A replay would be one rank's alone, where SyncBatchNorm needs all of them. (DDP refuses it
    # on CPUs, but a world of one is not wrapped.)
    if last == 0:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(Net())
        watch, _, _ = run(plants, NonFiniteGuard("skip"), net=net)
        assert watch.vetoed[0][1] == "step 2: rank 0, micro-batch 0: the loss is NaN"
        assert "not replayed" in watch.vetoed[1][1]

    # With a loss scale, an overflow of the gradient is the scale's affair; NaN losses are not.
    half = MixedPrecision("fp16", init_scale=2.0**40)
    watch, result, trainer = run([], NonFiniteGuard("stop"), callbacks=[half])
    assert result.steps == STEPS
    assert trainer.context.progress.updates < STEPS  # it did overflow
    assert not watch.vetoed
    half = MixedPrecision("fp16")
    watch, result, _ = run(plants[:1], NonFiniteGuard("skip"), callbacks=[half])
    assert [number for number, _ in watch.vetoed] == [2]
    return [number for number, _ in watch.vetoed]


def non_finite():
    found = origins()
    decisions()
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_not_finite_is_named_and_left_out(world_size):
    results = run_processes(non_finite, world_size, timeout_s=60)
    who = f"rank {world_size - 1}, micro-batch"
    for found in results:
        assert found["loss"] == (
            f"step 3: {who} 1: the loss is NaN; first NaN: output of 'encoder.0' (Fragile)"
        )
        assert found["gradient"] == (
            f"step 3: {who} 0: the loss is finite, its gradient is not: 'encoder.1.bias', "
            "'encoder.1.weight'"
        )
        assert found["loss function"] == (
            f"step 3: {who} 1: the loss is infinite; the outputs of all modules are finite: it "
            "arose in the loss function"
        )
        assert found["batch"] == (
            f"step 3: {who} 1: the loss is NaN; the batch holds NaN values; first NaN: output of "
            "'encoder.1' (Linear)"
        )
        assert found["infinite"] == (
            f"step 3: {who} 0: the loss is finite, its gradient is not: 'encoder.1.bias', "
            "'encoder.1.weight'; first infinite: output of 'encoder.0' (Fragile)"
        )
        assert "a callback changed it" in found["another callback"]
        assert found["parameter"] == (
            f"step 2: rank {world_size - 1}: NaN or infinite before the step: parameter "
            "'head.weight'"
        )


# -- LossSpikeGuard ---------------------------------------------------------------------------


class Spikes(dtrain.Callback):
    """Multiplies rank 0's loss in some steps."""

    def __init__(self, steps, factor):
        self.mine = dtrain.init(seed=0).rank == 0
        self.steps, self.factor = steps, factor

    def on_loss(self, ctx, step):
        if self.mine and step.number in self.steps:
            step.loss.mean = step.loss.mean * self.factor


def spiked(at, factor, guard, **options):
    watch = Watch()
    trainer = tiny.trainer([watch, Spikes(at, factor), guard], **options)
    result = trainer.fit(tiny.dataset(), batch_size=BATCH, max_steps=30, log_every=100)
    return watch, result, trainer


def bound_by_hand(losses, factor):
    median = np.median(losses)
    spread = 1.4826 * np.median(np.abs(np.array(losses) - median))
    return median + factor * max(spread, 0.01 * median)


def spikes():
    guard = LossSpikeGuard(factor=6, window=10)
    watch, result, _ = spiked([5, 14, 20], 50, guard)
    # The window is not full in step 5, which makes it part of the window.
    assert [number for number, _ in watch.vetoed] == [14, 20]
    assert watch.unchanged == [14, 20]
    assert result.steps == 30
    assert "step 14: the loss" in watch.vetoed[0][1]
    taken = [loss for k, loss in enumerate(watch.losses) if k not in (14, 20)]
    assert list(guard.losses) == taken[-10:]
    assert guard.bound() == pytest.approx(bound_by_hand(taken[-10:], 6), rel=1e-12)

    watch, result, _ = spiked([14], 50, LossSpikeGuard(window=10, action="stop"))
    assert [number for number, _ in watch.vetoed] == [14]
    assert result.steps == 16
    assert result.stop_reason == watch.vetoed[0][1]

    guard = LossSpikeGuard(window=10, action="warn")
    watch, result, _ = spiked(range(14, 30), 50, guard)
    assert not watch.vetoed
    assert len(watch.said) == 1  # a new level: after half a window it is the median
    assert guard.spikes_in_a_row == 0

    watch, result, _ = spiked(range(14, 30), 50, LossSpikeGuard(window=10, patience=3))
    assert [number for number, _ in watch.vetoed] == [14, 15, 16, 17]
    assert result.steps == 18
    assert "number 3 in a row" in result.stop_reason

    watch, _, _ = spiked([2], math.nan, LossSpikeGuard(window=10))
    assert [number for number, _ in watch.vetoed] == [2]  # NaN before the window is full
    return watch.losses[3:]


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_spike_is_left_out_by_all_ranks(world_size):
    results = run_processes(spikes, world_size, timeout_s=60)
    assert all(losses == results[0] for losses in results)


class Die(dtrain.Callback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, ctx, step):
        if ctx.progress.step == self.at:
            os._exit(9)


def guarded(run_dir, die_at=0):
    dtrain.init(seed=0)
    guard = LossSpikeGuard(window=6)
    callbacks = [Plant(1, [4, 9], 0, 111), Checkpoint(every_steps=4, background=False), guard]
    # The second spike is after the death: only with the window restored it is found.
    callbacks += [Spikes([7, 12], 50), NonFiniteGuard("skip"), Die(die_at)]
    watch = Watch()
    trainer = dtrain.Trainer(
        Net(), tiny.adam, loss_fn, callbacks=[watch, *callbacks], sinks=[], run_dir=run_dir
    )
    result = trainer.fit(tiny.dataset(), batch_size=BATCH, max_steps=16)
    return state_of(trainer.context), list(guard.losses), [k for k, _ in watch.vetoed], result.steps


def test_guards_go_on_after_a_resume(tmp_path):
    whole = run_processes(guarded, 2, tmp_path / "whole", timeout_s=60)
    # A NaN is a spike as well, and the later of the two guards gives the reason.
    assert whole[0][2] == whole[1][2] == [4, 7, 9, 12]
    assert whole[0][1] == whole[1][1]
    killed = run_outcomes(guarded, 2, tmp_path / "run", 11, timeout_s=60)
    assert {outcome.exitcode for outcome in killed} == {9}
    again = run_processes(guarded, 2, tmp_path / "run", timeout_s=60)
    for one, other in zip(again, whole, strict=True):
        assert one[:2] == other[:2]
        assert one[2] == [9, 12]
        assert one[3] == 16


# -- TimeLimit --------------------------------------------------------------------------------


class Clock:
    """A rank's clock: it is moved by hand."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Tick(dtrain.Callback):
    """Moves the last rank's clock by 10 s a step; and by 100 s in the first evaluation."""

    def __init__(self, clock, by_eval=0.0):
        world = dtrain.init(seed=0)
        self.mine = world.rank == world.size - 1
        self.clock, self.by_eval = clock, by_eval

    def on_step_start(self, ctx, step):
        self.clock.now += 10.0 * self.mine

    def on_eval_start(self, ctx):
        self.clock.now += self.by_eval * self.mine


def limited(limit, *, margin_s=0.0, then="stop", by_eval=0.0, eval_every=None, run_dir=None):
    clock = Clock()
    timer = TimeLimit(limit, margin_s=margin_s, then=then, clock=clock)
    trainer = tiny.trainer([Tick(clock, by_eval), timer], run_dir=run_dir)
    return trainer.fit(
        tiny.dataset(),
        batch_size=BATCH,
        max_steps=12,
        eval_set=tiny.dataset(),
        eval_every=eval_every or 100,
    )


def time_limits(folder):
    world = dtrain.init(seed=0)
    by = f" (asked by rank {world.size - 1} on {world.host})" if world.size > 1 else ""
    # Over after 5 steps, on one rank; the reduction of the sixth carries it.
    result = limited("50s")
    assert (result.steps, result.stop_reason) == (6, f"time limit of 50s{by}")
    assert limited(50).stop_reason == f"time limit of 50s{by}"
    assert limited("1m", margin_s=10).steps == 6
    assert limited(1e6).steps == 12
    # Evaluations settle requests: nothing is trained after one that took too long.
    assert limited("90s", by_eval=100.0, eval_every=4).steps == 4

    result = limited("45s", then="preempt", run_dir=folder)
    assert (result.steps, result.preempted) == (6, True)
    told = world.comm.on_main("status", lambda: json.loads((folder / "status.json").read_text()))
    assert told["status"] == "preempted"
    result = limited("85s", then="preempt", run_dir=folder)  # the clock starts anew
    assert (result.steps, result.preempted) == (12, False)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_time_limit_on_one_rank_ends_all(tmp_path, world_size):
    run_processes(time_limits, world_size, tmp_path / "run", timeout_s=60)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1d2h3m4s", 93784.0),
        ("3h50m", 13800.0),
        ("90m", 5400.0),
        (" 1.5H ", 5400.0),
        ("12s", 12.0),
        (7, 7.0),
        (0.5, 0.5),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "3", "3x", "5m1h", "-3h", "1:30:00", "h"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ConfigError, match="no duration"):
        TimeLimit(text)


# -- OverfitBatches ---------------------------------------------------------------------------


class Seen(dtrain.Callback):
    def __init__(self):
        self.batches = []
        self.losses = []

    def on_loss(self, ctx, step):
        x, _ = step.batch
        assert len(x) == step.samples
        self.batches.append((step.number, step.micro, x.sum().item()))

    def on_step_end(self, ctx, step):
        self.losses.append(step.loss_mean)


class Words(dtrain.Sink):
    def __init__(self):
        self.text = ""

    def write(self, report):
        self.text += report.text


def overfit():
    dtrain.init(seed=0)
    x = tiny.dataset(96).tensors[0]
    noise = torch.randint(2, (96,), generator=torch.Generator().manual_seed(5))  # no rule in it
    data = torch.utils.data.TensorDataset(x, noise)
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 2))
    seen, words = Seen(), Words()
    trainer = dtrain.Trainer(
        net,
        lambda net: torch.optim.Adam(net.parameters(), lr=0.03),
        tiny.loss_fn,
        callbacks=[OverfitBatches(2), GradientAccumulation(steps=2), seen],
        sinks=[words],
    )
    # 7 steps of 14, the last one of 12: the epochs' lengths are not those of the kept batches.
    trainer.fit(data, batch_size=14, max_steps=150)
    kept = {(number, micro): total for number, micro, total in seen.batches if number < 2}
    assert len(set(kept.values())) == 4
    for number, micro, total in seen.batches:
        assert total == kept[number % 2, micro]
    assert seen.losses[0] > 0.5
    assert max(seen.losses[-2:]) < 0.01
    assert "DEBUGGING" in words.text or not trainer.world.is_main
    # A second fit goes on with the same batches.
    before = len(seen.batches)
    trainer.fit(data, batch_size=14, max_steps=154)
    assert all(total == kept[number % 2, m] for number, m, total in seen.batches[before:])


def test_batches_are_kept_from_where_a_run_goes_on(tmp_path):
    seen = Seen()
    for callbacks, epochs in (([Checkpoint()], 1), ([Checkpoint(), OverfitBatches(2), seen], 3)):
        trainer = tiny.trainer(callbacks, run_dir=tmp_path)
        trainer.fit(tiny.dataset(40), batch_size=8, epochs=epochs)  # 5 steps each
    sums = [total for _, _, total in seen.batches]
    assert [number for number, _, _ in seen.batches] == [*range(5, 15)]
    assert sums == sums[:2] * 5
    assert sums[0] != sums[1]


def nan_twice(net, batch, ctx):
    loss = tiny.loss_fn(net, batch)
    loss.mean = loss.mean * (math.nan if ctx.progress.step in (1, 2) else 1)
    return loss


def test_a_loss_that_is_not_finite_is_told_of_once_in_a_fit():
    words = Words()
    dtrain.init(seed=0)
    trainer = dtrain.Trainer(tiny.model(), tiny.adam, nan_twice, sinks=[words])
    trainer.fit(tiny.dataset(32), batch_size=8, epochs=1)
    assert words.text.count("the loss is not finite") == 1
    assert "warning: the loss is not finite at step 1" in words.text


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_few_batches_are_learned_by_heart(world_size):
    run_processes(overfit, world_size, timeout_s=60)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NonFiniteGuard("warn"), "choose 's"),
        (lambda: NonFiniteGuard(patience=0), "1 or more"),
        (lambda: LossSpikeGuard(0), "more than 0"),
        (lambda: LossSpikeGuard(window=1), "2 or more"),
        (lambda: LossSpikeGuard(action="ignore"), "choose 's"),
        (lambda: LossSpikeGuard(patience=0), "1 or more"),
        (lambda: TimeLimit(10, margin_s=10), "less than the limit"),
        (lambda: TimeLimit(0), "more than 0"),
        (lambda: TimeLimit(10, then="leave"), "'stop' or 'preempt'"),
        (lambda: OverfitBatches(0), "1 or more"),
    ],
)
def test_wrong_arguments_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
