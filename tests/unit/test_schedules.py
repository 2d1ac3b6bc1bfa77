"""Each schedule equals its formula at every step, also after a resume, and refuses nonsense."""

import json
import math

import pytest
import torch
from torch import nn

from dtrain import schedules
from dtrain.checkpoint import tree
from dtrain.errors import ConfigError

LRS = (0.3, 0.002)  # of two parameter groups
TOTAL = 137


def optimizer(kind=torch.optim.SGD, **options):
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "lr": lr} for lr in LRS]
    return kind(groups, **options)


def rates(opt, scheduler, steps):
    """The rate of each group before each of ``steps`` steps."""
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in opt.param_groups])
        opt.step()
        scheduler.step()
    return found


def cosine(start, end, part):
    """Half a cosine from ``start`` at 0 to ``end`` at 1."""
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def warm(t, width, final):
    if t < width:
        return (t + 1) / width
    return cosine(1.0, final, min(1.0, (t - width) / (TOTAL - width)))


def cycle(t, factor, warmup, start, final):
    peak_at = max(warmup * TOTAL, 1.5) - 1
    if t <= peak_at:
        return factor * cosine(start, 1.0, t / peak_at)
    return factor * cosine(1.0, final, (t - peak_at) / (TOTAL - 1 - peak_at))


CASES = {
    "time_based": (schedules.time_based(0.07), lambda t: 1 / (1 + 0.07 * t)),
    "constant": (schedules.time_based(0), lambda t: 1.0),
    "step_decay": (schedules.step_decay(0.5, 10), lambda t: 0.5 ** math.floor(t / 10)),
    "exponential": (schedules.exponential(0.03), lambda t: math.exp(-0.03 * t)),
    "warmup_cosine": (schedules.warmup_cosine(20, 0.1), lambda t: warm(t, 20, 0.1)),
    "warmup_cosine by fraction": (schedules.warmup_cosine(0.1), lambda t: warm(t, 14, 0.0)),
    "warmup_cosine without": (schedules.warmup_cosine(0), lambda t: warm(t, 0, 0.0)),
    "one_cycle": (schedules.one_cycle(), lambda t: cycle(t, 1.0, 0.3, 0.04, 4e-6)),
    "one_cycle, all chosen": (
        schedules.one_cycle(2, warmup_fraction=0.2, start_fraction=0.1, final_fraction=0.01),
        lambda t: cycle(t, 2.0, 0.2, 0.1, 0.01),
    ),
    "one_cycle, steepest": (
        schedules.one_cycle(warmup_fraction=1 / TOTAL),
        lambda t: cycle(t, 1.0, 0.0, 0.04, 4e-6),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_its_formula(case):
    schedule, formula = CASES[case]
    opt = optimizer()
    found = rates(opt, schedule(opt, TOTAL), TOTAL)
    for t, by_group in enumerate(found):
        for lr0, lr in zip(LRS, by_group, strict=True):
            assert lr == pytest.approx(lr0 * formula(t), rel=1e-12, abs=1e-15), t


@pytest.mark.parametrize("case", CASES)
def test_resumes_with_the_same_bits(case):
    schedule, _ = CASES[case]
    opt = optimizer()
    whole = rates(opt, schedule(opt, TOTAL), TOTAL)
    for at in (0, 1, 19, 60):
        opt = optimizer()
        scheduler = schedule(opt, TOTAL)
        rates(opt, scheduler, at)
        # As a checkpoint holds it: JSON and tensors, and no function in it.
        plain, tensors = tree.split([scheduler.state_dict(), opt.state_dict()])
        text = json.dumps(plain)
        again = optimizer()
        scheduler = schedule(again, TOTAL)
        scheduler_state, optimizer_state = tree.join(json.loads(text), tensors)
        again.load_state_dict(optimizer_state)
        scheduler.load_state_dict(scheduler_state)
        again.step()  # torch warns of a scheduler that is stepped first
        assert rates(again, scheduler, TOTAL - at) == whole[at:]


def test_warmup_begins_small_and_the_cosine_ends_at_its_fraction():
    opt = optimizer()
    scheduler = schedules.warmup_cosine(10, 0.25)(opt, 50)
    found = [first for first, _ in rates(opt, scheduler, 60)]
    assert found[0] == pytest.approx(LRS[0] / 10)
    assert found[9] == found[10] == LRS[0] == max(found)
    assert found[50] == found[59] == pytest.approx(LRS[0] / 4)  # and stays there


def test_one_cycle_moves_momentum_only_if_asked():
    opt = optimizer(momentum=0.5)
    rates(opt, schedules.one_cycle()(opt, 10), 5)
    assert {group["momentum"] for group in opt.param_groups} == {0.5}
    opt = optimizer(torch.optim.AdamW)
    scheduler = schedules.one_cycle(warmup_fraction=0.5, momentum=(0.85, 0.95))(opt, 10)
    found = []
    for _ in range(10):
        found.append(opt.param_groups[1]["betas"])
        opt.step()
        scheduler.step()
    assert [first for first, _ in found] == pytest.approx(
        [cosine(0.95, 0.85, t / 4) for t in range(5)]
        + [cosine(0.85, 0.95, (t - 4) / 5) for t in range(5, 10)]
    )
    assert {second for _, second in found} == {0.999}


@pytest.mark.parametrize("total", range(1, 12))
def test_the_shortest_runs(total):
    for schedule in (
        schedules.one_cycle(),
        schedules.one_cycle(warmup_fraction=0.1),
        schedules.one_cycle(warmup_fraction=0.0),
        schedules.warmup_cosine(0.5),
        schedules.warmup_cosine(0.99),
    ):
        opt = optimizer()
        found = rates(opt, schedule(opt, total), total)
        assert all(0 <= lr <= LRS[0] * 1.0001 for lr, _ in found)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedules.time_based(-1), "time_based(decay=-1): must be 0 or more"),
        (lambda: schedules.time_based(math.nan), "decay=nan"),
        (lambda: schedules.exponential(math.inf), "exponential(k=inf)"),
        (lambda: schedules.exponential(-0.1), "k=-0.1"),
        (lambda: schedules.step_decay(0, 10), "step_decay(drop=0)"),
        (lambda: schedules.step_decay(1.5, 10), "drop=1.5"),
        (lambda: schedules.step_decay(0.5, 0), "every=0"),
        (lambda: schedules.step_decay(0.5, 2.5), "every=2.5): must be a whole number"),
        (lambda: schedules.warmup_cosine(-1), "warmup_steps=-1"),
        (lambda: schedules.warmup_cosine(1.0), "a fraction of all steps"),
        (lambda: schedules.warmup_cosine(True), "warmup_steps=True"),
        (lambda: schedules.warmup_cosine(10, 1.5), "final_fraction=1.5"),
        (lambda: schedules.warmup_cosine(50)(optimizer(), 50), "the run has only 50 steps"),
        (lambda: schedules.one_cycle(0), "peak_factor=0"),
        (lambda: schedules.one_cycle(warmup_fraction=1), "warmup_fraction=1"),
        (lambda: schedules.one_cycle(start_fraction=0), "start_fraction=0"),
        (lambda: schedules.one_cycle(final_fraction=2), "final_fraction=2"),
        (lambda: schedules.one_cycle(momentum=(0.95, 0.85)), "(lowest, highest)"),
        (
            lambda: schedules.one_cycle(momentum=(0.85, 0.95))(
                optimizer(torch.optim.Adagrad), TOTAL
            ),
            "Adagrad has neither momentum nor betas",
        ),
    ],
)
def test_refuses_nonsense(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)
