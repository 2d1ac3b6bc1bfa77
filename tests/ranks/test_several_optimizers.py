"""`optimizer=[a, b]`: one loss, stepped together, as one optimizer is."""

import math

import pytest
import tiny
import torch
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

import dtrain
from dtrain.callbacks import (
    Checkpoint,
    ClipGradients,
    GradientAccumulation,
    LRSchedule,
    MixedPrecision,
    ParamSchedule,
)
from dtrain.errors import ConfigError, ResumeError
from dtrain.testing import run_processes, run_ranks

STEPS = 20


def optimizers(net):
    matrices = [p for p in net.parameters() if p.dim() == 2]
    rest = [p for p in net.parameters() if p.dim() != 2]
    return [SGD(matrices, lr=0.1, momentum=0.9), AdamW(rest, lr=3e-2, weight_decay=0.1)]


def callbacks():
    return [
        ClipGradients(0.5),
        LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, steps), optimizer=1),
        ParamSchedule("momentum", lambda p: 0.9 - 0.01 * p.step, optimizer=0),
    ]


def loss_fn(net, batch):
    return F.cross_entropy(net(batch[0].double()), batch[1])


def train(strategy="auto", micros=1, run_dir=None, stop_at=None, more=(), make=optimizers):
    class Leave(dtrain.Callback):
        def on_step_end(self, ctx, step):
            if step.number + 1 == stop_at:
                ctx.request.preempt("told to")

    run = tiny.trainer(
        [GradientAccumulation(micros), *callbacks(), *more, Leave()],
        net=tiny.model(dtype=torch.float64),
        optimizer=make,
        loss=loss_fn,
        strategy=strategy,
        run_dir=run_dir,
    )
    result = run.fit(tiny.dataset(50), batch_size=14, max_steps=STEPS, log_every=5)
    params = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    state = run.context.optimizer.state_dict()
    return params, state, result, [run.context.optimizers[key] for key in (0, 1)]


def by_hand():
    """The same in plain torch, on the batches that dtrain makes."""
    seen = []

    class See(dtrain.Callback):
        def on_batch(self, ctx, step):
            seen.append(step.batch)

    train(more=[See()])
    net = tiny.model(dtype=torch.float64)
    first, second = optimizers(net)
    schedule = CosineAnnealingLR(second, STEPS)
    for number, batch in enumerate(seen):
        first.param_groups[0]["momentum"] = 0.9 - 0.01 * number
        for one in (first, second):
            one.zero_grad()
        loss_fn(net, batch).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        first.step()
        second.step()
        schedule.step()
    return {n: p.detach() for n, p in net.named_parameters()}


@pytest.mark.parametrize(
    ("world_size", "strategy", "micros"), [(1, "ddp", 2), (2, "flat", 1), (3, "ddp", 2)]
)
def test_the_parameters_are_those_of_a_loop_by_hand(world_size, strategy, micros):
    expected = by_hand()
    ranks = run_processes(train, world_size, strategy, micros, timeout_s=60)
    for params, *_ in ranks:
        for name, value in params.items():
            assert (value - expected[name]).norm() <= 1e-12 * expected[name].norm(), name
            assert torch.equal(value, ranks[0][0][name])


def test_reports_have_every_rate_and_one_norm():
    result = train()[2]
    row = next(row for row in result.history if "train/loss" in row)
    assert {"lr", "lr/1", "grad_norm"} <= row.keys()
    assert result.metrics["lr"] == 0.1
    assert result.metrics["lr/1"] == pytest.approx(
        3e-2 * (1 + math.cos(math.pi * (STEPS - 1) / STEPS)) / 2
    )
    assert result.metrics["momentum/0"] == pytest.approx(0.9 - 0.01 * (STEPS - 1))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path, world_size):
    def interrupted():
        train(run_dir=tmp_path / str(world_size), stop_at=7, more=[Checkpoint(every_steps=100)])
        return train(run_dir=tmp_path / str(world_size), more=[Checkpoint(every_steps=100)])

    def straight():
        return train()

    whole, parts = run_ranks(straight, world_size), run_ranks(interrupted, world_size)
    for (params, state, *_), (theirs, their_state, result, _) in zip(whole, parts, strict=True):
        assert result.steps == STEPS
        assert all(torch.equal(theirs[name], value) for name, value in params.items())
        assert state["param_groups"] == their_state["param_groups"]
        for number, held in state["state"].items():
            for name, value in held.items():
                assert torch.equal(torch.as_tensor(value), their_state["state"][number][name])


def test_a_run_with_other_optimizers_is_not_gone_on_with(tmp_path):
    train(run_dir=tmp_path, stop_at=3, more=[Checkpoint(every_steps=100)])

    def swapped(net):
        matrices = [p for p in net.parameters() if p.dim() == 2]
        rest = [p for p in net.parameters() if p.dim() != 2]
        return [SGD(rest, lr=0.1, momentum=0.9), AdamW(matrices, lr=3e-2, weight_decay=0.1)]

    with pytest.raises(ResumeError, match=r"there, group 0 \(SGD\): 2 parameters \(0.weight"):
        train(run_dir=tmp_path, more=[Checkpoint(every_steps=100)], make=swapped)
    one = tiny.trainer([ClipGradients(0.5)], net=tiny.model(dtype=torch.float64), run_dir=tmp_path)
    with pytest.raises(ResumeError, match=r"optimizer: 'SGD \+ AdamW' there, 'AdamW' here"):
        one.fit(tiny.dataset(50), batch_size=14, max_steps=STEPS)


def test_a_step_that_is_vetoed_steps_none_of_them():
    class Veto(dtrain.Callback):
        def on_grads_ready(self, ctx, step):
            step.veto("always")

    start = tiny.model(dtype=torch.float64)
    params, state, result, _ = train(more=[Veto()])
    assert all(torch.equal(params[n], p) for n, p in start.named_parameters())
    assert not state["state"]
    assert result.updates == 0


def test_fused_ones_are_handed_what_an_update_is_told():
    """A loss scale's overflow reaches each of them, as one veto."""

    def make(net):
        first, *rest = net.parameters()
        return [AdamW([first], lr=1e-2, fused=True), AdamW(rest, lr=1e-2, fused=True)]

    def loss(net, batch, ctx):
        return F.cross_entropy(net(batch[0]), batch[1]) * (1e9 if ctx.progress.step < 2 else 1)

    class Look(dtrain.Callback):
        def on_step_end(self, ctx, step):
            now = [p.detach().clone() for p in ctx.model.parameters()]
            moved.append([not torch.equal(a, b) for a, b in zip(now, before[-1], strict=True)])
            before.append(now)
            applied.append(step.applied)

    moved, applied = [], []
    run = tiny.trainer([MixedPrecision("fp16", init_scale=4.0), Look()], optimizer=make, loss=loss)
    before = [[p.detach().clone() for p in run.model.parameters()]]
    run.fit(tiny.dataset(48), batch_size=16, max_steps=3)
    assert applied == [False, False, True]
    assert moved == [[False] * 4, [False] * 4, [True] * 4]


def test_clipping_one_of_them_leaves_the_other():
    class Norms(dtrain.Callback):
        def on_grads_ready(self, ctx, step):
            for key, one in ctx.optimizers.items():
                grads = [p.grad for group in one.param_groups for p in group["params"]]
                norms[key].append(float(torch.nn.utils.get_total_norm(grads)))

    norms = {0: [], 1: []}
    clip = ClipGradients(1e-3, optimizer=1)
    run = tiny.trainer([clip, Norms()], optimizer=optimizers)
    result = run.fit(tiny.dataset(48), batch_size=16, max_steps=3)
    assert max(norms[1]) <= 1e-3 < min(norms[0])
    assert result.metrics["grad_norm/1"] > 1e-3


def test_a_scheduler_of_one_of_them_is_stepped():
    net = tiny.model()
    both = optimizers(net)
    schedule = LRSchedule(ExponentialLR(both[1], 0.5))
    run = tiny.trainer([schedule], net=net, optimizer=both)
    run.fit(tiny.dataset(48), batch_size=16, max_steps=3)
    assert [one.param_groups[0]["lr"] for one in both] == [0.1, 3e-2 / 8]
    assert list(run.context.optimizers.values()) == both


def test_what_cannot_be_is_refused():
    def refused(match, optimizer, callbacks=()):
        with pytest.raises(ConfigError, match=match):
            tiny.trainer(callbacks, optimizer=optimizer).fit(
                tiny.dataset(), batch_size=8, max_steps=1
            )

    refused(
        r"0\.weight.* in several of the optimizers \(0, 1\): each parameter is stepped by one",
        lambda net: [SGD(net.parameters(), lr=1), AdamW(net[0].parameters())],
    )
    refused(
        r"several \(SGD, ExponentialLR\).*A scheduler is a callback",
        lambda net: [(sgd := SGD(net.parameters(), lr=1)), ExponentialLR(sgd, 0.5)],
    )
    refused("several .nothing.", lambda net: [])
    refused(
        "optimizer=2: there is no such optimizer; there are 0, 1",
        optimizers,
        [ClipGradients(1.0, optimizer=2)],
    )
    refused("parameter group 0 has no 'betas'", optimizers, [ParamSchedule("betas", lambda p: 0)])
    with pytest.raises(ConfigError, match=r"ctx.optimizers\[0\].add_param_group"):
        tiny.trainer(optimizer=optimizers).optimizer.add_param_group({"params": []})


def test_one_in_a_list_is_that_one():
    net = tiny.model()
    only = tiny.adam(net)
    assert tiny.trainer(net=net, optimizer=[only]).optimizer is only
