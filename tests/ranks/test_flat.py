"""One flat tensor of gradients: the numbers of DDP, one reduction, and errors that are votes."""

import pytest
import tiny
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import (
    ClipGradients,
    Freeze,
    GradientAccumulation,
    GradientNoise,
    MixedPrecision,
    NonFiniteGuard,
)
from dtrain.errors import ConfigError, RemoteError, UnusedParameters
from dtrain.strategies import DDP, Flat, choose
from dtrain.testing import run_outcomes, run_processes, run_ranks, try_ranks

STEPS = 18


class Odd(nn.Module):
    """Tied, 0-dim, channels_last, and of two dtypes; one branch is used by some batches only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(2, 6, 3, padding=1).double().to(memory_format=torch.channels_last)
        self.one = nn.Linear(6, 6).double()
        self.two = nn.Linear(6, 6).double()
        self.two.weight = self.one.weight
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.single = nn.Linear(6, 2)
        self.branch = nn.Linear(6, 2).double()

    def forward(self, x, with_branch):
        hidden = self.conv(x).relu().mean((2, 3))
        hidden = self.two(torch.tanh(self.one(hidden)))
        out = self.scale * self.single(hidden.float()).double()
        return out + self.branch(hidden) if with_branch else out


def odd_data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 2, 4, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x.mean((1, 2, 3)) > 0).long(), torch.arange(40))


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def odd(strategy, micros, branch):
    """``branch``: which samples, by their number, use it: every, none in the first 20, or none."""

    def loss(net, batch):
        x, y, numbers = batch
        used = branch == "always" or (branch == "by rank" and bool((numbers % 3 == 0).any()))
        return nn.functional.cross_entropy(net(x, used), y)

    dtrain.init(seed=0)
    model = Odd()
    trainer = tiny.trainer(
        [GradientAccumulation(micros), ClipGradients(0.5)],
        net=model,
        optimizer=lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1),
        loss=loss,
        strategy=strategy(find_unused_parameters=branch != "always"),
    )
    trainer.fit(odd_data(), batch_size=7, max_steps=STEPS)
    state = trainer.optimizer.state_dict()["state"]
    return parameters(model), {place: int(one["step"]) for place, one in state.items()}


@pytest.mark.parametrize("branch", ["always", "by rank", "never"])
@pytest.mark.parametrize("micros", [1, 2])
def test_the_numbers_are_those_of_ddp(micros, branch):
    ddp = run_processes(odd, 3, DDP, micros, branch)[0]
    for found, updates in run_processes(odd, 3, Flat, micros, branch):
        assert updates == ddp[1]  # what had no gradient was not decayed either
        for name, value in found.items():
            exact = value.dtype == torch.float64 and "single" not in name
            distance = (value - ddp[0][name]).norm() / ddp[0][name].norm()
            assert distance <= (1e-6 if exact else 1e-5), (name, distance)


def counted(strategy):
    """Counts what travels with gradients in each step."""
    world = dtrain.init(seed=0)
    calls = []
    real = type(world.gradients).all_reduce

    def all_reduce(self, buffer, op="sum"):
        calls.append(buffer.numel())
        real(self, buffer, op)

    type(world.gradients).all_reduce = all_reduce
    per_step = []

    class Counts(dtrain.Callback):
        def on_step_start(self, ctx, step):
            calls.clear()

        def on_step_end(self, ctx, step):
            per_step.append(len(calls))

    trainer = tiny.trainer(
        [GradientAccumulation(3), ClipGradients(1.0), Counts()], strategy=strategy
    )
    trainer.fit(tiny.dataset(50), batch_size=12, epochs=1)
    return per_step


def test_a_step_has_one_reduction():
    assert run_processes(counted, 2, "flat") == [[1] * 5] * 2


class Replaces(dtrain.Callback):
    """Puts another tensor in the place of a gradient, as users may."""

    def on_grads_ready(self, ctx, step):
        p = next(ctx.model.parameters())
        p.grad = p.grad * 0.5


def with_callbacks(strategy, *names):
    known = {
        "noise": lambda: GradientNoise(eta=0.01),
        "replaces": Replaces,
        "freeze": lambda: Freeze("0", until_epoch=1),
        "value": lambda: ClipGradients(max_value=0.05),
        "norm": lambda: ClipGradients(max_norm=0.3),
        "fp16": lambda: MixedPrecision("fp16", init_scale=2.0**40),
    }
    trainer = tiny.trainer([known[name]() for name in names], strategy=strategy)
    trainer.fit(tiny.dataset(50), batch_size=12, epochs=3)
    return parameters(trainer.model), trainer.context.progress.updates


@pytest.mark.parametrize(
    "names",
    [("replaces", "norm"), ("noise", "value"), ("freeze", "norm"), ("fp16", "norm")],
    ids="+".join,
)
def test_callbacks_see_the_same_gradients(names):
    for world_size in (1, 2):
        ddp, updates = run_ranks(with_callbacks, world_size, "ddp", *names)[0]
        for found, theirs in run_ranks(with_callbacks, world_size, "flat", *names):
            assert theirs == updates
            assert (updates < 15) == ("fp16" in names)  # overflows were left out, not applied
            for name, value in found.items():
                assert torch.allclose(value, ddp[name], rtol=1e-4, atol=1e-6), name


class Cancels(dtrain.Callback):
    """Takes a layer's gradients away, as self-distillation does with its last layer."""

    def __init__(self):
        self.norms = []

    def on_grads_ready(self, ctx, step):
        ctx.model[2].zero_grad()
        left = [p.grad for p in ctx.model[0].parameters()]
        self.norms.append((float(ctx.gradient_norm()), float(torch.nn.utils.get_total_norm(left))))


@pytest.mark.parametrize("strategy", [Flat(), Flat(find_unused_parameters=True), DDP()])
def test_gradients_that_a_hook_took_away_are_none(strategy):
    cancels = Cancels()
    tiny.trainer([cancels], strategy=strategy).fit(tiny.dataset(), batch_size=12, max_steps=2)
    for found, left in cancels.norms:
        assert found == pytest.approx(left, rel=1e-6)


def train_a_part(strategy):
    """The optimizer has the first layer only; the second one's gradient is far larger."""
    dtrain.init(seed=0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight.mul_(20)
    last = net[1].weight.detach().clone()
    trainer = tiny.trainer(
        [ClipGradients(max_norm=0.3)],
        net=net,
        optimizer=lambda net: torch.optim.SGD(net[0].parameters(), lr=0.1),
        strategy=strategy,
    )
    result = trainer.fit(tiny.dataset(50), batch_size=12, epochs=3)
    assert torch.equal(net[1].weight, last)
    return parameters(net), result.metrics["grad_norm"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_the_optimizer_does_not_have_is_not_clipped_with_the_rest(world_size):
    ddp, norm = run_ranks(train_a_part, world_size, "ddp")[0]
    for found, theirs in run_ranks(train_a_part, world_size, "flat"):
        assert theirs == pytest.approx(norm, rel=1e-5)
        for name, value in found.items():
            assert torch.allclose(value, ddp[name], rtol=1e-4, atol=1e-6), name


class Poison(dtrain.Callback):
    """A NaN in one gradient of one step; and something in all of the tensors in another."""

    def on_grads_ready(self, ctx, step):
        if step.number == 2:
            next(ctx.model.parameters()).grad.fill_(torch.nan)
        if step.number == 4:
            for grad in ctx.gradients():
                grad.add_(0.01)


def bad_step(strategy):
    """Parameters whose numbers of elements are no powers of two."""
    dtrain.init(seed=0)
    net = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3))
    callbacks = [Poison(), ClipGradients(max_norm=0.3), NonFiniteGuard("skip")]
    trainer = tiny.trainer(callbacks, net=net, strategy=strategy)
    result = trainer.fit(tiny.dataset(50), batch_size=12, epochs=3)
    return parameters(net), trainer.context.progress.updates, result.metrics["grad_norm"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_bad_step_leaves_nothing_behind(world_size):
    ddp, updates, norm = run_ranks(bad_step, world_size, "ddp")[0]
    assert updates == 14  # of 15
    for found, theirs, their_norm in run_ranks(bad_step, world_size, "flat"):
        assert theirs == updates
        assert their_norm == pytest.approx(norm, rel=1e-5)
        for name, value in found.items():
            assert torch.allclose(value, ddp[name], rtol=1e-4, atol=1e-6), name


# ----------------------------------------------------------------------------- which it is


def test_auto_takes_flat_up_to_a_bucket():
    bucket = 25 * 2**20 // 4
    assert isinstance(choose("auto", nn.Linear(bucket - 1, 1)), Flat)
    assert isinstance(choose("auto", nn.Linear(bucket, 1)), DDP)
    frozen = nn.Sequential(nn.Linear(bucket, 2).requires_grad_(False), nn.Linear(2, 2))
    assert isinstance(choose("auto", frozen), Flat)
    assert isinstance(choose("auto", nn.EmbeddingBag(9, 2, sparse=True)), DDP)
    assert isinstance(choose("auto", nn.Sequential(nn.SyncBatchNorm(2))), DDP)
    with pytest.raises(
        ConfigError, match="strategy='horovod': choose 'auto', 'flat', 'ddp' or 'fsdp'"
    ):
        choose("horovod", nn.Linear(2, 2))


class Told(dtrain.Sink):
    def __init__(self):
        self.text = ""

    def write(self, report):
        self.text += report.text if report.kind == "start" else ""


def start_block(strategy, options):
    told = Told()
    dtrain.init(seed=0)
    net = tiny.model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, **options)
    trainer = dtrain.Trainer(net, optimizer, tiny.loss_fn, sinks=[told], strategy=strategy)
    trainer.fit(tiny.dataset(), batch_size=16, max_steps=1)
    return told.text


def test_the_start_block_says_how_gradients_meet_and_what_would_be_quicker():
    for strategy, words in (
        ("auto", "gradients: one reduction after backward (0.00"),
        ("ddp", "gradients: in buckets, during backward (strategy='ddp')"),
    ):
        text, other = run_ranks(start_block, 2, strategy, {})
        assert words in text
        assert "advice: AdamW(..., fused=True)" in text
        assert not other  # only rank 0 has sinks
    for options in ({"fused": True}, {"fused": False}):  # chosen already, either way
        (text,) = run_ranks(start_block, 1, "auto", options)
        assert "advice" not in text
        assert "gradients" not in text


# ----------------------------------------------------------------------------- what goes wrong


class Explodes(torch.autograd.Function):
    """Raises in backward, where it is told to."""

    armed = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if Explodes.armed:
            raise ValueError("planted in backward")
        return grad


def fail_in_backward(run_dir, micros, failing):
    world = dtrain.init(seed=0)

    def loss(net, batch):
        Explodes.armed = trainer.context.progress.step == 4 and world.rank == failing
        out = tiny.loss_fn(net, batch)
        out.mean = Explodes.apply(out.mean)
        return out

    trainer = tiny.trainer(
        [GradientAccumulation(micros)], loss=loss, strategy="flat", run_dir=run_dir
    )
    before = []

    class Keeps(dtrain.Callback):
        def on_error(self, ctx, error):
            before.append((ctx.progress.step, tiny.digest(ctx.model)))

    trainer.hooks.callbacks += (Keeps(),)
    try:
        trainer.fit(tiny.dataset(), batch_size=16, epochs=2)
    except Exception as error:  # noqa: BLE001 -- looked at by the test
        return type(error), str(error), before, (run_dir / "emergency").is_dir()
    return None


@pytest.mark.parametrize("micros", [1, 2])
def test_an_error_in_backward_is_a_vote(tmp_path, micros):
    ranks = run_processes(fail_in_backward, 3, tmp_path, micros, 1)
    assert [kind for kind, *_ in ranks] == [RemoteError, ValueError, RemoteError]
    for _, words, before, emergency in ranks:
        assert "planted in backward" in words
        assert before == ranks[0][2]  # all of them at the same step, with the same parameters
        assert before[0][0] == 4
        assert emergency
    assert "rank 1 on" in ranks[0][1]
    assert "failed in backward at step 4" in ranks[0][1]


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.left = nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x):
        return self.used(x)


def unused(strategy):
    run = tiny.trainer(net=Half(), strategy=strategy)
    run.fit(tiny.dataset(), batch_size=16, epochs=1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_unused_parameters_are_named_as_ddp_does(world_size):
    for strategy in ("ddp", "flat"):
        for outcome in try_ranks(unused, world_size, strategy):
            assert isinstance(outcome.error, UnusedParameters), (strategy, outcome.trace)
            assert "no gradient reached left.weight, left.bias" in str(outcome.error)


class Table(nn.Module):
    """Sparse without a module that says so."""

    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.Parameter(torch.ones(9, 8)), nn.Linear(8, 3)

    def forward(self, x):
        rows = nn.functional.embedding(torch.arange(len(x)) % 9, self.rows, sparse=True)
        return self.head(x + rows)


def train_a_table(strategy):
    net = Table()
    run = tiny.trainer(
        net=net, strategy=strategy, optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.1)
    )
    run.fit(tiny.dataset(), batch_size=16, epochs=1)


def test_a_sparse_gradient_that_nobody_announced_is_told():
    for outcome in try_ranks(train_a_table, 2, "auto"):
        assert "gradient is sparse" in str(outcome.error), outcome.trace
        assert "strategy='ddp'" in str(outcome.error)


def refused():
    run = tiny.trainer(net=nn.Sequential(nn.EmbeddingBag(9, 2, sparse=True)), strategy="flat")
    run.fit(tiny.dataset(), batch_size=16, epochs=1)


def test_what_a_flat_tensor_cannot_hold_is_refused():
    for outcome in run_outcomes(refused, 2):
        assert isinstance(outcome.error, ConfigError)
        assert "cannot train this model: gradients of 0 are sparse. Use 'ddp'." in str(
            outcome.error
        )
