"""Loss functions that compare their samples with those of all ranks."""

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import ClipGradients, GradientAccumulation, MixedPrecision
from dtrain.errors import ConfigError, RankMismatch, RemoteError
from dtrain.testing import run_outcomes, run_processes

STEPS = 12


class Pairs(nn.Module):
    """Two views of a sample, as in CLIP (Radford et al., ICML 2021)."""

    def __init__(self):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.right = nn.Linear(5, 3)

    def forward(self, a, b):
        return F.normalize(self.left(a), dim=-1), F.normalize(self.right(b), dim=-1)


def pairs(samples):
    generator = torch.Generator().manual_seed(samples)
    a = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    b = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(a, b, torch.arange(samples))


def contrast(model, batch, ctx):
    """Each row against all rows of the other view, wherever they are."""
    left, right = model(*batch[:2])
    lefts = ctx.comm.gather_with_grad("left", left)
    rights = ctx.comm.gather_with_grad("right", right)
    everyone = ctx.comm.gather_with_grad("number", batch[2])
    here = (everyone[:, None] == batch[2]).int().argmax(0)
    loss = F.cross_entropy(left @ rights.T * 5, here) + F.cross_entropy(right @ lefts.T * 5, here)
    return dtrain.Loss(loss / 2, metrics={"rows": float(len(rights))})


class SkipSome(dtrain.Callback):
    """Rank 1 leaves out its batch in every third step, before or after its loss."""

    def __init__(self, hook):
        self.hook = hook
        self.mine = dtrain.init(seed=0).rank == 1

    def on_batch(self, ctx, step):
        if self.mine and self.hook == "on_batch" and step.number % 3 == 0:
            ctx.request.skip("planted")

    def on_loss(self, ctx, step):
        if self.mine and self.hook == "on_loss" and step.number % 3 == 0:
            ctx.request.skip("planted")


class KeepNumbers(dtrain.Callback):
    """Which samples were trained on in each step, on this rank."""

    def __init__(self):
        self.seen = []

    def on_loss(self, ctx, step):
        self.seen.append((step.number, step.batch[2].tolist()))


def trainer(*callbacks, loss=contrast, **options):
    dtrain.init(seed=0)
    torch.manual_seed(1)
    return tiny.trainer(callbacks, net=Pairs().double(), loss=loss, **options)


def fit(batch_size, samples, *callbacks, loss=contrast):
    record, numbers = tiny.Record(), KeepNumbers()
    run = trainer(*callbacks, numbers, record, ClipGradients(0.5), loss=loss)
    run.fit(pairs(samples), batch_size=batch_size, max_steps=STEPS)
    values = run.evaluate(pairs(samples), batch_size=batch_size)
    parameters = [p.detach().clone() for p in run.model.parameters()]
    return parameters, record.losses, values, numbers.seen


CASES = [(6, 18), (7, 24), (2, 9), (1, 3)]


def train_all():
    return {case: fit(*case) for case in CASES}


def test_the_loss_is_that_of_the_global_batch():
    (truth,) = run_processes(train_all, 1)
    for world_size in (2, 3):
        for found in run_processes(train_all, world_size):
            for case in CASES:
                parameters, losses, values, _ = found[case]
                expected = truth[case]
                assert losses == pytest.approx(expected[1], rel=1e-12, abs=1e-12), case
                assert values == pytest.approx(expected[2], rel=1e-12), case
                for one, other in zip(parameters, expected[0], strict=True):
                    assert (one - other).norm() <= 1e-12 * other.norm(), case
    # The batches of 6 over 3 ranks were of 6 rows, not 2.
    assert truth[6, 18][2]["eval/rows"] == 6


# ------------------------------------------------------------------------------ some ranks are away


def by_hand(seen_by_rank):
    """The same training in plain torch, on the samples that some rank trained on."""
    torch.manual_seed(1)
    model = Pairs().double()
    optimizer = tiny.adam(model)
    a, b, _ = pairs(24).tensors
    for number in range(STEPS):
        rows = [i for seen in seen_by_rank for n, batch in seen if n == number for i in batch]
        left, right = model(a[rows], b[rows])
        here = torch.arange(len(rows))
        loss = F.cross_entropy(left @ right.T * 5, here) + F.cross_entropy(right @ left.T * 5, here)
        optimizer.zero_grad()
        (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return list(model.parameters())


def skipping(hook, micros):
    extra = [] if micros == 1 else [GradientAccumulation(steps=micros)]
    return fit(6, 24, SkipSome(hook), *extra)


def test_a_skip_before_the_loss_leaves_the_samples_out_of_everyones():
    found = run_processes(skipping, 3, "on_batch", 1)
    expected = by_hand([seen for *_, seen in found])
    assert [len(seen) for *_, seen in found] == [12, 8, 12]
    for parameters, *_ in found:
        for one, other in zip(parameters, expected, strict=True):
            assert (one - other).norm() <= 1e-12 * other.norm()


@pytest.mark.parametrize(("hook", "micros"), [("on_batch", 2), ("on_loss", 1), ("on_loss", 2)])
def test_nobody_waits_for_a_rank_that_skips(hook, micros):
    found = run_processes(skipping, 3, hook, micros, timeout_s=40)
    for parameters, losses, *_ in found:
        assert losses == found[0][1]
        assert len(losses) == STEPS
        assert all(map(torch.equal, parameters, found[0][0]))


def streams():
    """Rank 0 has two batches, rank 1 has four; trains and evaluates on them."""
    world = dtrain.init(seed=0)
    a, b, n = pairs(12).tensors
    mine = [(a[i : i + 2], b[i : i + 2], n[i : i + 2]) for i in range(0, 12, 2)]
    mine = mine[:2] if world.rank == 0 else mine[2:]
    run = trainer()
    result = run.fit(mine, epochs=2)
    return result.steps, run.evaluate(mine), tiny.digest(run.model)


def test_streams_of_unequal_length():
    found = run_processes(streams, 2)
    assert found[0] == found[1]
    steps, values, _ = found[0]
    assert steps == 8
    # Two batches of 2 + 2 rows, then two of 2: the mean over 12 samples.
    assert values["eval/rows"] == pytest.approx((8 * 4 + 4 * 2) / 12)


def weightless(model, batch, ctx):
    """On rank 1 the loss weighs nothing; its rows need no gradient either."""
    left, right = model(*batch[:2])
    mine = dtrain.init(seed=0).rank == 1
    rights = ctx.comm.gather_with_grad("right", right.detach() if mine else right)
    return dtrain.Loss((left @ rights.T).logsumexp(-1).mean(), weight=0 if mine else len(left))


def test_a_rank_whose_loss_weighs_nothing_takes_part_in_backward():
    found = run_processes(fit_weightless, 2)
    assert [losses for _, losses, *_ in found] == [found[0][1]] * 2
    assert len(found[0][1]) == STEPS


def fit_weightless():
    return fit(6, 24, loss=weightless)


def half_precision():
    record = tiny.Record()
    run = trainer(MixedPrecision("fp16"), record)
    run.model.float()
    data = TensorDataset(*(t.float() if t.is_floating_point() else t for t in pairs(24).tensors))
    run.fit(data, batch_size=6, max_steps=8)
    return record.losses, record.applied


def test_half_precision_gathers_too():
    (alone,) = run_processes(half_precision, 1)
    both = run_processes(half_precision, 2)
    assert both[0] == both[1]
    assert both[0][0] == pytest.approx(alone[0], rel=1e-2)
    # The loss scale overflows in the same steps.
    assert both[0][1] == alone[1]
    assert 2 <= sum(alone[1]) < 8


# ------------------------------------------------------------------------------ mistakes


def failing(when):
    rank = dtrain.init(seed=0).rank

    def loss_fn(model, batch, ctx):
        step = ctx.progress.step
        if when == "before" and rank == 1 and step == 2:
            raise ValueError("planted")
        if when == "late" and step < 2:
            return sum(view.sum() for view in model(*batch[:2]))
        left, right = model(*batch[:2])
        label = f"right {rank}" if when == "labels" and step == 2 else "right"
        wide = when == "shapes" and rank == 1
        rights = ctx.comm.gather_with_grad(label, right.repeat(1, 2) if wide else right)
        if when == "between" and rank == 1 and step == 2:
            raise ValueError("planted")
        lefts = ctx.comm.gather_with_grad("left", left)
        return (lefts @ rights[:, :3].T).mean()

    fit(6, 24, loss=loss_fn)


@pytest.mark.parametrize(
    ("when", "kinds", "words"),
    [
        ("before", (RemoteError, ValueError), ["rank 1", "planted"]),
        ("between", (RemoteError, ValueError), ["rank 1", "planted"]),
        ("labels", (RankMismatch, RankMismatch), ["rank 0: gather_with_grad('right 0')"]),
        ("shapes", (RankMismatch, RankMismatch), ["float64[rows, 3]", "float64[rows, 6]"]),
        ("late", (ConfigError, ConfigError), ["first time in a later micro-step"]),
    ],
)
def test_a_mistake_on_one_rank_is_an_error_on_all(when, kinds, words):
    outcomes = run_outcomes(failing, 2, when, timeout_s=20)
    assert tuple(type(outcome.error) for outcome in outcomes) == kinds
    for word in words:
        assert word in str(outcomes[0].error)


def outside():
    comm = dtrain.init(seed=0).comm
    with pytest.raises(ConfigError, match=r"works in loss functions only .* use all_gather"):
        comm.gather_with_grad("x", torch.zeros(2))


def test_it_is_refused_outside_of_a_loss_function():
    run_processes(outside, 1)
