"""Penalties, noise, mixtures and freezing: each against its formula, on any number of ranks."""

import math
from collections import OrderedDict
from functools import cache
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import GradientAccumulation
from dtrain.callbacks.freeze import Freeze
from dtrain.callbacks.gradient_noise import GradientNoise
from dtrain.callbacks.l1_l2_penalty import L1L2Penalty
from dtrain.callbacks.label_smoothing import LabelSmoothing
from dtrain.callbacks.mixup import Mixup
from dtrain.callbacks.targets import hard_labels
from dtrain.errors import ConfigError, DataError, RemoteError
from dtrain.testing import run_processes

# 50 = 4 x 12 + 2: the last batch is ragged, and with three ranks one of them has nothing in it.
SAMPLES, BATCH_SIZE, EPOCHS, STEPS = 50, 12, 3, 15
L1, L2, ETA, GAMMA, EPS, SKIPPED = 3e-3, 2e-2, 1e-3, 0.55, 0.2, 7

OPTIMIZERS = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1),
}
CALLBACKS = {
    "penalty": lambda: [L1L2Penalty(L1, L2)],
    "penalty on biases": lambda: [L1L2Penalty(l1=L1, params=lambda name, p: "bias" in name)],
    "noise": lambda: [GradientNoise(ETA, GAMMA), SkipAll()],
    "smoothing": lambda: [LabelSmoothing(EPS, 2)],
    "freeze": lambda: [Freeze({"0": 2, "*bias": 1})],
}


def data():
    x, y = tiny.dataset(SAMPLES).tensors
    return x.double(), y


class SkipAll(dtrain.Callback):
    """Every rank leaves one step out, so that updates are fewer than steps."""

    def on_batch(self, ctx, step):
        if step.number == SKIPPED:
            ctx.request.skip("as planned")


class Keep(dtrain.Callback):
    """Keeps where the shared generator stands when a run begins."""

    def on_fit_start(self, ctx):
        self.generator = bytes(ctx.shared_rng.get_state().tolist())


def weighted(net, batch):
    """A mean over other units than samples: those of class 1 count twice."""
    x, y = batch
    units = 1.0 + hard_labels(y)
    losses = F.cross_entropy(net(x), y, reduction="none")
    return dtrain.Loss.from_sum((units * losses).sum(), units.sum())


def train(kind, optimizer, micro_batch_size):
    keep = Keep()
    callbacks = [*CALLBACKS[kind](), keep]
    if micro_batch_size:
        callbacks.append(GradientAccumulation(micro_batch_size=micro_batch_size))
    net = tiny.model(dtype=torch.float64)
    trainer = tiny.trainer(callbacks, net=net, optimizer=OPTIMIZERS[optimizer], loss=weighted)
    fed = dtrain.Data(TensorDataset(*data()), BATCH_SIZE, shuffle=False)
    result = trainer.fit(fed, epochs=EPOCHS)
    return net.state_dict(), keep.generator, result.history


@cache
def by_hand(kind, optimizer, generator):
    """The same training with plain torch, in one process, on whole batches."""
    net = tiny.model(dtype=torch.float64)
    opt = OPTIMIZERS[optimizer](net)
    noise = torch.Generator()
    noise.set_state(torch.tensor(list(generator), dtype=torch.uint8))
    x, y = data()
    updates, history = 0, []
    for step in range(STEPS):
        epoch, batch = divmod(step, 5)
        if batch == 0:
            history.append([0.0, 0.0, 0.0])
        rows = slice(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE)
        if kind == "noise" and step == SKIPPED:
            for p in net.parameters():  # drawn in a step that all skip, too
                torch.randn(p.shape, generator=noise, dtype=torch.float64)
            continue
        if kind == "freeze":
            for name, p in net.named_parameters():
                frozen = (name.startswith("0.") and epoch < 2) or ("bias" in name and epoch < 1)
                p.requires_grad_(not frozen)
        opt.zero_grad()
        units = 1.0 + y[rows]
        smoothing = EPS if kind == "smoothing" else 0.0
        losses = F.cross_entropy(net(x[rows]), y[rows], reduction="none", label_smoothing=smoothing)
        loss = (units * losses).sum() / units.sum()
        loss.backward()
        penalty = 0.0
        for name, p in net.named_parameters():
            w = p.detach()
            if kind == "penalty" and name.endswith("weight"):
                p.grad += L1 * w.sign() + 2 * L2 * w
                penalty += float(L1 * w.abs().sum() + L2 * (w**2).sum())
            if kind == "penalty on biases" and name.endswith("bias"):
                p.grad += L1 * w.sign()
                penalty += float(L1 * w.abs().sum())
            if kind == "noise":
                sigma = math.sqrt(ETA / (1 + updates) ** GAMMA)
                p.grad += sigma * torch.randn(p.shape, generator=noise, dtype=torch.float64)
        opt.step()
        updates += 1
        for i, value in enumerate([1.0, loss.item() + penalty, penalty]):
            history[-1][i] += float(units.sum()) * value
    return net.state_dict(), [(loss / weight, pen / weight) for weight, loss, pen in history]


# -- mixtures -----------------------------------------------------------------------------------


class Watch(dtrain.Callback):
    """Keeps the batches as they are at this place in the list."""

    def __init__(self, name):
        self.name = name
        self.batches = []

    def on_batch(self, ctx, step):
        self.batches.append(tuple(part.clone() for part in step.batch))


def mix(callbacks=(), **options):
    """Trains; returns batches before and after, figures, the model, and evaluation's dtypes."""
    before, after, dtypes = Watch("before"), Watch("after"), set()
    seen = set()

    def loss_fn(net, batch):
        x, y = batch
        accuracy = (net(x).argmax(1) == hard_labels(y)).double().mean()
        seen.add(y.dtype)
        return dtrain.Loss(F.cross_entropy(net(x), y), metrics={"accuracy": accuracy})

    def eval_fn(net, batch):
        dtypes.add(batch[1].dtype)
        return loss_fn(net, batch)

    net = tiny.model(dtype=torch.float64)
    trainer = tiny.trainer(
        [before, *callbacks, after], net=net, loss=loss_fn, eval_fn=eval_fn, **options
    )
    pairs = TensorDataset(*data())
    result = trainer.fit(pairs, batch_size=24, epochs=3, eval_set=pairs)
    batches = list(zip(before.batches, after.batches, strict=True))
    return SimpleNamespace(
        batches=batches, metrics=result.metrics, digest=tiny.digest(net), eval_dtypes=dtypes
    )


# -- freezing -----------------------------------------------------------------------------------


def blocks():
    """An encoder with BatchNorm and dropout, whose first bias its user has frozen; and a head."""
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Tanh())
    encoder[0].bias.requires_grad_(False)
    return nn.Sequential(OrderedDict(encoder=encoder, head=nn.Linear(16, 2)))


class Film(dtrain.Callback):
    """Keeps every parameter, buffer and mode, as they are when an epoch ends."""

    def __init__(self):
        self.frames = []

    def on_step_end(self, ctx, step):
        modes = {name: module.training for name, module in ctx.model.named_modules()}
        frozen = {name for name, p in ctx.model.named_parameters() if not p.requires_grad}
        state = {name: tensor.clone() for name, tensor in ctx.model.state_dict().items()}
        if ctx.progress.step_in_epoch == ctx.progress.steps_per_epoch:
            self.frames.append(SimpleNamespace(state=state, modes=modes, frozen=frozen))


class Leave(dtrain.Callback):
    """Asks to save and go after a step, as a scheduler's signal would."""

    def __init__(self, at):
        self.at = at

    def on_step_end(self, ctx, step):
        if ctx.progress.step == self.at:
            ctx.request.preempt("as planned")


def thaw(eval_mode, run_dir=None, leave_at=-1, until_epoch=2):
    net, film = blocks(), Film()
    first = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    freeze = Freeze("encoder", until_epoch=until_epoch, eval_mode=eval_mode)
    callbacks = [freeze, film, Leave(leave_at)]
    trainer = tiny.trainer(callbacks, net=net, optimizer=OPTIMIZERS["adamw"], run_dir=run_dir)
    notes = list(trainer.context._outbox.notes)
    result = trainer.fit(tiny.dataset(), batch_size=24, epochs=4)
    return SimpleNamespace(
        frames=[SimpleNamespace(state=first), *film.frames],
        notes=notes,
        steps=result.steps,
        preempted=result.preempted,
        digest=tiny.digest(net),
        left_frozen={name for name, p in net.named_parameters() if not p.requires_grad},
        left_modes={module.training for module in net.modules()},
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_a_tied_parameter_is_frozen_under_each_of_its_names():
    for name in ("first.weight", "second.weight"):
        net = Tied()
        before = net.first.weight.detach().clone()
        trainer = tiny.trainer(
            [Freeze(name, until_epoch=9)],
            net=net,
            optimizer=lambda net: torch.optim.SGD(net.parameters(), 0.1),
            loss=lambda net, batch: net(batch[0][:, :5].float()).square().mean(),
        )
        trainer.fit(tiny.dataset(), batch_size=24, epochs=1)
        assert torch.equal(net.second.weight, before)
        assert net.first.bias.grad is not None


def said(callback, pairs):
    """What this rank is told where a callback cannot work."""
    trainer = tiny.trainer([callback], net=blocks(), loss=lambda net, batch: net(batch[0]).mean())
    with pytest.raises((ConfigError, DataError, RemoteError)) as caught:
        trainer.fit(pairs, batch_size=24, epochs=1)
    return str(caught.value)


def everything(folder):
    """All runs of this file, on one set of ranks."""
    found = {
        (kind, optimizer, micro): train(kind, optimizer, micro)
        for kind in CALLBACKS
        for optimizer in OPTIMIZERS
        for micro in (None, 3)
    }
    found["mixup"] = mix([Mixup(1.0, 2)])
    found["mixup again"] = mix([Mixup(1.0, 2)])
    found["mixup, smoothed"] = mix([Mixup(1.0, 2), LabelSmoothing(EPS, 2)])
    found["smoothed, mixup"] = mix([LabelSmoothing(EPS, 2), Mixup(1.0, 2)])
    found["smoothed"] = mix([LabelSmoothing(EPS, 2)])
    found["freeze"] = thaw(eval_mode=False)
    found["freeze, eval mode"] = thaw(eval_mode=True)
    found["misspelt"] = said(Freeze("encodr", until_epoch=1), tiny.dataset())
    found["bad target"] = said(Mixup(1, 3), TensorDataset(torch.ones(48, 8), torch.ones(48, 2)))
    found["leave"], found["go on"] = [], []
    if dtrain.init(seed=0).size > 2:
        return found  # DDP adds in another order after a start, so bits are equal up to two ranks
    for at in (2, 4, 6, 9):  # four steps an epoch: frozen twice, and while it thaws
        for kind in ("leave", "go on"):
            run = thaw(True, folder / f"freeze-{at}", at if kind == "leave" else -1)
            found[kind].append(run)
    return found


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request, tmp_path_factory):
    return run_processes(everything, request.param, tmp_path_factory.mktemp("runs"), timeout_s=60)


def assert_equal(found, wanted):
    for name, tensor in wanted.items():
        scale = float(tensor.norm())
        assert float((found[name] - tensor).norm()) <= 1e-12 * scale, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", CALLBACKS)
def test_equals_its_formula_by_hand(ranks, kind, optimizer):
    for rank in ranks:
        for micro in (None, 3):
            state, generator, history = rank[kind, optimizer, micro]
            wanted, figures = by_hand(kind, optimizer, generator)
            assert_equal(state, wanted)
            for report, (loss, penalty) in zip(history, figures, strict=True):
                assert report["train/loss"] == pytest.approx(loss, rel=1e-12)
                if "penalty" in kind:
                    assert report["train/penalty"] == pytest.approx(penalty, rel=1e-12)
            assert generator == ranks[0][kind, optimizer, None][1]


def share_of(y, soft):
    """The part of its own class in a sample that was mixed with the other one."""
    return float(soft[torch.arange(len(y)), y].min())


def test_mixup_mixes_each_sample_with_another_of_the_micro_batch(ranks):
    for rank in ranks:
        run = rank["mixup"]
        for (x, y), (mixed, soft) in run.batches:
            share = share_of(y, soft)
            if share > 0.999:  # nobody met the other class: the share cannot be told from targets
                continue
            others = (mixed - share * x) / (1 - share)
            distance = torch.cdist(others, x)
            partners = distance.argmin(1)
            assert sorted(partners.tolist()) == list(range(len(x)))
            assert float(distance.amin(1).max()) < 1e-9
            targets = F.one_hot(y, 2).double()
            wanted = share * targets + (1 - share) * targets[partners]
            torch.testing.assert_close(soft, wanted, rtol=1e-12, atol=1e-12)


def test_mixup_repeats_itself_and_differs_between_ranks(ranks):
    shares = []
    for rank in ranks:
        assert rank["mixup"].digest == rank["mixup again"].digest == ranks[0]["mixup"].digest
        shares.append([share_of(y, soft) for (_, y), (_, soft) in rank["mixup"].batches])
        assert len(set(shares[-1])) > len(shares[-1]) / 2  # drawn anew for each batch
    assert len({tuple(values) for values in shares}) == len(ranks)


def test_evaluation_gets_its_labels_as_they_are(ranks):
    for rank in ranks:
        for kind in ("mixup", "mixup, smoothed", "smoothed"):
            assert rank[kind].eval_dtypes == {torch.int64}
            assert 0.5 < rank[kind].metrics["eval/accuracy"] <= 1
            assert 0.5 < rank[kind].metrics["train/accuracy"] <= 1


def test_smoothing_and_mixup_in_any_order(ranks):
    for rank in ranks:
        one, other = rank["mixup, smoothed"], rank["smoothed, mixup"]
        for mixed, (_, first), (_, second) in zip(
            rank["mixup"].batches, one.batches, other.batches, strict=True
        ):
            for a, b in zip(first, second, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            assert first[0].equal(mixed[1][0])  # the same mixtures as without smoothing
            torch.testing.assert_close(first[1], (1 - EPS) * mixed[1][1] + EPS / 2)
        for (x, y), (same, soft) in rank["smoothed"].batches:
            assert same.equal(x)
            torch.testing.assert_close(soft, (1 - EPS) * F.one_hot(y, 2).double() + EPS / 2)


def test_the_share_is_beta_distributed():
    generator = torch.Generator().manual_seed(5)
    context, draws = SimpleNamespace(rng=generator), 2000
    for alpha in (0.2, 1.0, 4.0):
        shares = []
        for _ in range(draws):
            step = dtrain.Step(number=0, batch=(torch.eye(8, dtype=torch.float64), torch.arange(8)))
            Mixup(alpha, 8).on_batch(context, step)
            shares.append(float(step.batch[0].diagonal().min()))
        shares = torch.tensor(shares)
        variance = 1 / (4 * (2 * alpha + 1))
        # Five standard errors of the mean; the variance within a tenth.
        assert float(shares.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(variance / draws))
        assert float(shares.var()) == pytest.approx(variance, rel=0.1)


def unchanged(frame, other, part):
    return {
        name for name in frame.state if part in name and frame.state[name].equal(other.state[name])
    }


def test_frozen_bits_rest_until_their_epoch(ranks):
    weights = {"encoder.0.weight", "encoder.1.weight", "encoder.1.bias"}
    buffers = {"encoder.1.running_mean", "encoder.1.running_var", "encoder.1.num_batches_tracked"}
    for rank in ranks:
        for kind in ("freeze", "freeze, eval mode"):
            run = rank[kind]
            assert run.notes == []  # the optimizer has all that requires a gradient
            assert [len(frame.frozen) for frame in run.frames[1:]] == [4, 4, 1, 1]
            for epoch in range(4):
                same = unchanged(run.frames[epoch], run.frames[epoch + 1], "")
                resting = {"encoder.0.bias"}  # which its user froze: never thawed
                if epoch < 2:
                    resting |= weights  # weight decay included
                    if kind == "freeze, eval mode":
                        resting |= buffers
                assert same == resting
                modes = run.frames[epoch + 1].modes
                rests = kind == "freeze, eval mode" and epoch < 2
                assert {name for name, training in modes.items() if not training} == (
                    {name for name in modes if name.startswith("encoder")} if rests else set()
                )
            # The model is as it was given.
            assert run.left_frozen == {"encoder.0.bias"}
            assert run.left_modes == {True}


def test_parameters_are_equal_on_all_ranks(ranks):
    for rank in ranks:
        for kind in ("freeze", "freeze, eval mode"):
            for name, tensor in rank[kind].frames[-1].state.items():
                if "running" not in name:
                    assert tensor.equal(ranks[0][kind].frames[-1].state[name])


def test_freezing_goes_on_exactly_after_a_resume(ranks):
    for rank in ranks:
        if len(ranks) < 3:
            # With the buffers, which a checkpoint has of rank 0 only.
            assert ranks[0]["freeze, eval mode"].digest == ranks[0]["go on"][0].digest
        for left, again in zip(rank["leave"], rank["go on"], strict=True):
            assert left.preempted
            assert left.steps < 16
            assert again.steps == 16
            assert again.left_frozen == {"encoder.0.bias"}
            for name, tensor in rank["freeze, eval mode"].frames[-1].state.items():
                if "running" not in name:
                    assert tensor.equal(again.frames[-1].state[name])


# -- refusals -----------------------------------------------------------------------------------


def test_what_cannot_work_is_said_on_every_rank(ranks):
    for rank in ranks:
        for words in ("Freeze('encodr') matches no parameter", "Did you mean", "head.weight"):
            assert words in rank["misspelt"]
        assert "targets must be class indices [B], or soft targets [B, 3]" in rank["bad target"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: L1L2Penalty(), "L1L2Penalty(l1=0.0, l2=0.0)"),
        (lambda: L1L2Penalty(l1=-1.0, l2=2.0), "l1=-1.0"),
        (lambda: L1L2Penalty(l2=math.nan), "l2=nan"),
        (lambda: GradientNoise(0), "eta=0"),
        (lambda: GradientNoise(1, gamma=-1), "gamma=-1"),
        (lambda: Mixup(0, 10), "alpha=0"),
        (lambda: Mixup(0.2, 1), "num_classes=1"),
        (lambda: LabelSmoothing(1.0, 10), "eps=1.0"),
        (lambda: LabelSmoothing(0.1, 1), "num_classes=1"),
        (lambda: Freeze("encoder"), "give a name and until_epoch"),
        (lambda: Freeze({"encoder": 2}, until_epoch=2), "give a name and until_epoch"),
        (lambda: Freeze("encoder", until_epoch=0), "until_epoch=0): must be 1 or more"),
        (lambda: Freeze({"encoder": 1.5}), "until_epoch=1.5"),
    ],
)
def test_refuses_nonsense(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)


def test_a_penalty_on_nothing_is_refused():
    penalty = L1L2Penalty(1.0, params=lambda name, p: False)
    with pytest.raises(ConfigError, match=r"none of the model's 4 parameters: 0\.weight"):
        penalty.on_fit_start(SimpleNamespace(model=tiny.model()))


def test_frozen_weights_and_biases_are_not_penalised():
    net, penalty = tiny.model(), L1L2Penalty(l1=2.0)
    net[0].weight.requires_grad_(False)
    step = dtrain.Step(0, loss=dtrain.Loss(torch.zeros((), requires_grad=True)))
    penalty.on_fit_start(SimpleNamespace(model=net))
    penalty.on_loss(SimpleNamespace(model=net), step)
    step.loss.mean.backward()
    assert step.loss.metrics["penalty"] == step.loss.mean == 2 * net[2].weight.abs().sum()
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["2.weight"]


def test_weights_that_were_replaced_are_penalised():
    net, penalty = tiny.model(), L1L2Penalty(l1=2.0)
    penalty.on_fit_start(SimpleNamespace(model=net))
    net[2] = nn.Linear(16, 3)
    step = dtrain.Step(0, loss=dtrain.Loss(torch.zeros((), requires_grad=True)))
    penalty.on_loss(SimpleNamespace(model=net), step)
    expected = 2 * (net[0].weight.abs().sum() + net[2].weight.abs().sum())
    assert step.loss.mean.item() == pytest.approx(expected.item())


def test_hard_labels_of_hard_and_of_soft():
    y = torch.tensor([[2, 0], [1, 1]])
    soft = F.one_hot(y, 3).movedim(-1, 1) * 0.7 + 0.1
    assert hard_labels(y) is y
    assert hard_labels(soft).equal(y)
    assert hard_labels(soft[:, :, 0]).equal(y[:, 0])


@pytest.mark.parametrize("make", [lambda: Mixup(1.0, 3), lambda: LabelSmoothing(0.1, 3)])
@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(4, 3),
        [torch.ones(4, 3)],
        (torch.ones(4, 3), [0, 1, 2, 0]),
        (torch.ones(4, 3), torch.ones(4, 2)),
        (torch.ones(4, 3), torch.ones(4, 3, dtype=torch.int64)),
        (torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), torch.ones(4)),
    ],
)
def test_batches_that_are_no_pair_are_refused(make, batch):
    with pytest.raises(DataError, match=r"Mixup|LabelSmoothing"):
        make().on_batch(SimpleNamespace(rng=torch.Generator()), dtrain.Step(0, batch=batch))
