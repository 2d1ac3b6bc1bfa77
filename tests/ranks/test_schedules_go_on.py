"""What becomes of a schedule where a run goes on: longer, shorter, with another rate or curve."""

import pytest
import tiny
import torch
from test_going_on import At, Rates, fit
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

import dtrain
from dtrain.callbacks import Checkpoint, LRSchedule
from dtrain.errors import ConfigError
from dtrain.schedules import one_cycle, warmup_cosine

SGD = {"optimizer": lambda net: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)}
CURVES = {
    "cosine": lambda opt, n: CosineAnnealingLR(opt, n),
    "warm-up": warmup_cosine(2),
    "OneCycleLR": lambda opt, n: OneCycleLR(opt, 0.1, total_steps=n),
    "one_cycle": one_cycle(),
}


def go_on(how, run_dir, curve, *, replan=None, every="step", first=1, then=2, **more):
    """Trains one epoch, then more: in the same process, or by a restart; returns rates, words."""

    rates = Rates()

    def callbacks():
        return [LRSchedule(curve, every=every, replan=replan), Checkpoint(), rates]

    name = {} if how == "restart" else {"name": "main"}
    trainer, _, told = fit(run_dir, callbacks(), epochs=first, **SGD, **name)
    rates.rates.clear()
    if how == "restart":
        _, _, told = fit(run_dir, callbacks(), epochs=then, **SGD, **more)
    else:
        told.words.clear()
        trainer.fit(tiny.dataset(32), batch_size=8, epochs=then, **name, **more)
    return rates.rates, [line for line in told.words if line.startswith("LRSchedule")]


HOW = pytest.mark.parametrize("how", ["restart", "further fit"])


@HOW
@pytest.mark.parametrize("name", CURVES)
def test_a_curve_that_is_over_is_refused_in_words(tmp_path, how, name):
    with pytest.raises(ConfigError) as raised:
        go_on(how, tmp_path, CURVES[name])
    words = str(raised.value)
    assert words.startswith(
        "LRSchedule: its curve was planned for 4 steps, and 8 are asked for, at step 4. Say what "
        "becomes of it: LRSchedule(..., replan=True) begins a new curve over the 4 steps that are "
        "left, from lr 0.1; replan=False keeps the old one, and from its end on the rate stays "
    )


def whole(curve):
    rates = Rates()
    fit(None, [LRSchedule(curve), rates], **SGD)
    return rates.rates


@HOW
@pytest.mark.parametrize("name", CURVES)
def test_a_new_curve_over_what_is_left(tmp_path, how, name):
    rates, words = go_on(how, tmp_path / "run", CURVES[name], replan=True)
    assert words == [
        "LRSchedule: its curve was planned for 4 steps; a new one begins, over the 4 that are left "
        "of 8, from lr 0.1"
    ]
    assert rates == whole(CURVES[name])  # of as many steps
    if how == "restart":  # once planned anew, it is no other at the next start
        _, _, told = fit(
            tmp_path / "run", [LRSchedule(CURVES[name], replan=True), Checkpoint()], epochs=3, **SGD
        )
        assert told.words[-1].startswith("LRSchedule: its curve was planned for 8 steps; a new one")


@HOW
@pytest.mark.parametrize("name", CURVES)
def test_the_old_curve_kept_stays_at_its_end(tmp_path, how, name):
    rates, (words,) = go_on(how, tmp_path, CURVES[name], replan=False)
    assert rates == whole(CURVES[name])[-1:] * 4
    assert words.startswith("LRSchedule: its curve was planned for 4 steps, of 8 now; from its end")


@pytest.mark.parametrize("name", CURVES)
def test_the_old_curve_is_kept_at_its_end_also_where_it_was_stepped_beyond(tmp_path, name):
    rates = Rates()
    fit(tmp_path, [LRSchedule(CURVES[name]), Checkpoint()], **SGD)
    fit(tmp_path, [LRSchedule(CURVES[name], replan=False), Checkpoint(), rates], epochs=2, **SGD)
    assert rates.rates == whole(CURVES[name])[-1:] * 4


def chained(opt, n):
    return ChainedScheduler([CosineAnnealingLR(opt, n), ExponentialLR(opt, 0.9)], opt)


def sequential(opt, n):
    warm = LinearLR(opt, 0.1, total_iters=2)
    return SequentialLR(opt, [warm, CosineAnnealingLR(opt, n - 2)], milestones=[2])


@HOW
@pytest.mark.parametrize("curve", [chained, sequential])
def test_schedulers_made_of_others(tmp_path, how, curve):
    rates, _ = go_on(how, tmp_path / "anew", curve, replan=True)
    assert rates == whole(curve)
    rates, _ = go_on(how, tmp_path / "kept", curve, replan=False)
    assert rates == whole(curve)[-1:] * 4
    with pytest.raises(ConfigError, match="Say what becomes of it"):
        go_on(how, tmp_path / "none", curve)


@HOW
def test_a_rate_that_is_a_tensor_stays_one(tmp_path, how, monkeypatch):
    def make(net):
        return torch.optim.Adam(net.parameters(), lr=torch.tensor(0.1), foreach=False)

    monkeypatch.setitem(SGD, "optimizer", make)
    curve = CURVES["cosine"]
    rates, _ = go_on(how, tmp_path / "run", curve, replan=True, override={"lr": 0.05})
    assert rates == pytest.approx([rate / 2 for rate in whole(curve)], abs=1e-5)
    rates, _ = go_on(how, tmp_path / "same", curve, replan=True)
    assert rates == pytest.approx(whole(curve), abs=1e-5)


def test_a_group_that_was_added_between_two_fits_gets_a_new_curve():
    net = tiny.model()
    optimizer = torch.optim.SGD(net[0].parameters(), lr=0.1)
    told = tiny.Words("message")
    dtrain.init(seed=0)
    callbacks = [LRSchedule(CURVES["cosine"], replan=True)]
    net[2].requires_grad_(False)
    trainer = dtrain.Trainer(net, optimizer, tiny.loss_fn, callbacks=callbacks, sinks=[told])
    trainer.fit(tiny.dataset(32), batch_size=8, epochs=1, name="main")
    net[2].requires_grad_(True)
    optimizer.add_param_group({"params": list(net[2].parameters()), "lr": 0.2})
    trainer.fit(tiny.dataset(32), batch_size=8, epochs=2, name="main")
    assert told.words[-1].endswith("over the 4 that are left of 8, from lr 0.1, 0.2")


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_another_optimizer_gets_a_new_curve_over_what_is_left(every):
    net, told, rates = tiny.model(), tiny.Words("message"), []

    class Notes(dtrain.Callback):
        def on_step_start(self, ctx, step):
            rates.append(ctx.optimizer.param_groups[0]["lr"])

    dtrain.init(seed=0)
    first = torch.optim.SGD(net.parameters(), lr=0.1)
    callbacks = [LRSchedule(lambda o, n: LinearLR(o, 1.0, 0.1, n), every=every), Notes()]
    trainer = dtrain.Trainer(net, first, tiny.loss_fn, callbacks=callbacks, sinks=[told])
    trainer.fit(tiny.dataset(32), batch_size=8, epochs=1, name="main")
    trainer.optimizer = torch.optim.SGD(net.parameters(), lr=0.4)
    trainer.fit(tiny.dataset(32), batch_size=8, epochs=3, name="main")
    left = {"step": "8 steps of 12", "epoch": "2 epochs of 3"}[every]
    assert f"LRSchedule: another optimizer, and a new curve, over the {left} left" in told.words
    curve = [0.4 * (1 - 0.9 * step / 8) for step in range(8)]
    assert rates[4:] == pytest.approx(curve if every == "step" else [0.4] * 4 + [0.22] * 4)
    ends = pytest.approx(0.04)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [ends]


@HOW
def test_a_curve_by_epochs_is_planned_anew_alike(tmp_path, how):
    curve = CURVES["cosine"]
    rates, _ = go_on(how, tmp_path, curve, replan=True, every="epoch", first=2, then=5)
    assert rates == [r for r in (0.1, 0.075, 0.025) for _ in range(4)]


@HOW
def test_a_curve_that_does_not_hang_on_the_length_goes_on_without_a_word(tmp_path, how):
    for replan in (None, False):
        halves = lambda opt, n: StepLR(opt, 2, gamma=0.5)  # noqa: E731
        rates, words = go_on(how, tmp_path / str(replan), halves, replan=replan)
        assert (rates, words) == ([0.025, 0.025, 0.0125, 0.0125], [])


@HOW
def test_another_rate_needs_another_curve(tmp_path, how):
    override = {"lr": 0.02}
    with pytest.raises(ConfigError, match="are asked for, at step 4"):
        go_on(how, tmp_path / "a", CURVES["cosine"], replan=False, override=override)
    rates, (words,) = go_on(how, tmp_path / "b", CURVES["cosine"], replan=True, override=override)
    assert words.endswith("from lr 0.02")
    assert max(rates) <= 0.02


def test_a_cosine_that_climbs_back_is_told(tmp_path):
    def run(epochs, turn):
        net = tiny.model()
        optimizer = SGD["optimizer"](net)
        callbacks = [LRSchedule(CosineAnnealingLR(optimizer, turn)), Checkpoint()]
        _, _, told = fit(tmp_path, callbacks, optimizer=optimizer, net=net, epochs=epochs)
        return [line for line in told.words if line.startswith("LRSchedule")]

    assert run(1, 4) == []
    climbs = "is at its lowest after 4 steps of 8, and climbs back from there"
    kept = "LRSchedule: T_max 4 there, 8 here: the old one is kept"
    assert run(2, 8) == [kept, f"LRSchedule: the CosineAnnealingLR {climbs}"]


OTHERS = {
    "gamma": (lambda o, n: StepLR(o, 4, 0.5), lambda o, n: StepLR(o, 4, 0.1), "gamma 0.5 there"),
    "kind": (CosineAnnealingLR, CURVES["OneCycleLR"], "kind CosineAnnealingLR there, OneCycleLR"),
    "of others": (CosineAnnealingLR, sequential, "kind CosineAnnealingLR there, SequentialLR here"),
    "parts": (chained, sequential, "kind ChainedScheduler there, SequentialLR here"),
    "limits": (
        lambda o, n: OneCycleLR(o, 0.1, n),
        lambda o, n: OneCycleLR(o, 0.2, n),
        "max_lr 0.1 there, 0.2 here",
    ),
    "a function": (warmup_cosine(2), warmup_cosine(4), "factor 0 "),
    "its own length": (
        lambda o, n: CosineAnnealingLR(o, 4),
        lambda o, n: CosineAnnealingLR(o, 8),
        "T_max 4 there, 8 here",
    ),
}


def leave_and_go_on(run_dir, before, after, *, given=False, first=None, epochs=2, **second):
    """Trains 3 steps of 8 with one schedule, the rest with another; returns rates and words."""

    def run(make, callbacks, epochs, **options):
        net, rates = tiny.model(), Rates()
        optimizer = SGD["optimizer"](net)
        if make is not None:
            scheduler = make(optimizer, 4 * epochs) if given else make
            callbacks = [LRSchedule(scheduler, **options), *callbacks]
        how = {"optimizer": optimizer, "net": net, "epochs": epochs, "eval_set": tiny.dataset(8)}
        _, _, told = fit(run_dir, [*callbacks, Checkpoint(), rates], **how)
        return rates.rates, [line for line in told.words if line.startswith("LRSchedule")]

    leaves = At("step_start", 2, lambda ctx: ctx.request.preempt("leave"))
    run(before, [leaves], 2, **(first or {}))
    return run(after, [], epochs, **second)


@pytest.mark.parametrize("name", OTHERS)
def test_another_scheduler_needs_another_curve(tmp_path, name):
    before, after, words = OTHERS[name]
    for replan in (None, False):
        with pytest.raises(ConfigError, match="Say what becomes of it") as raised:
            leave_and_go_on(tmp_path / str(replan), before, after, replan=replan)
        assert f"another scheduler is here ({words}" in str(raised.value)
    rates, told = leave_and_go_on(tmp_path / "anew", before, after, replan=True)
    optimizer = SGD["optimizer"](tiny.model())
    scheduler, curve = after(optimizer, 5), []
    for _ in range(5):
        curve.append(round(float(optimizer.param_groups[0]["lr"]), 6))
        optimizer.step()
        scheduler.step()
    assert rates == curve
    assert told[0].endswith("a new one begins, over the 5 that are left of 8, from lr 0.1")


def test_a_given_scheduler_of_other_values_keeps_the_old_and_another_kind_is_refused(tmp_path):
    before, after, _ = OTHERS["gamma"]
    rates, told = leave_and_go_on(tmp_path / "values", before, after, given=True)
    assert told == ["LRSchedule: gamma 0.5 there, 0.1 here: the old one is kept"]
    assert rates == [0.1, 0.05, 0.05, 0.05, 0.05]
    with pytest.raises(ConfigError, match="make it as it was, or pass a function"):
        leave_and_go_on(tmp_path / "kind", before, sequential, given=True)
    cycle = CURVES["OneCycleLR"]
    with pytest.raises(ConfigError, match="OneCycleLR is over after 8 steps, and the run has 12"):
        leave_and_go_on(tmp_path / "longer", cycle, cycle, given=True, epochs=3)


def test_another_plateau_judges_anew(tmp_path):
    _, (told,) = leave_and_go_on(
        tmp_path,
        lambda o, n: ReduceLROnPlateau(o, patience=0),
        lambda o, n: ReduceLROnPlateau(o, "max", patience=0),
        first={"monitor": "eval/loss"},
        monitor="eval/accuracy",
    )
    assert told.endswith(
        "eval/loss there, eval/accuracy here: the one here is used, and judges anew"
    )


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["cosine", "OneCycleLR", "sequential"])
def test_a_schedule_that_is_new_begins_where_the_run_is(tmp_path, name, given):
    make = {**CURVES, "sequential": sequential}[name]
    rates, (told,) = leave_and_go_on(tmp_path, None, make, given=given)
    assert told.startswith("LRSchedule is new in this run: its ")
    assert told.endswith("begins here" + ", over the 5 steps that are left" * (not given))
    optimizer = SGD["optimizer"](tiny.model())
    scheduler, curve = make(optimizer, 8 if given else 5), []
    for _ in range(5):
        curve.append(round(float(optimizer.param_groups[0]["lr"]), 6))
        optimizer.step()
        scheduler.step()
    assert rates == curve


@pytest.mark.parametrize("hook", ["step_start", "epoch_end"])  # the next start owes it, or not
def test_a_schedule_by_epochs_that_is_new_begins_with_the_next_epoch(tmp_path, hook):
    step = {"step_start": 3, "epoch_end": 4}[hook]
    leaves = At(hook, step, lambda ctx: ctx.request.preempt("leave"))
    fit(tmp_path, [leaves, Checkpoint(every_steps=4)], epochs=3, eval_set=tiny.dataset(8), **SGD)
    rates = Rates()
    schedule = LRSchedule(lambda o, n: LinearLR(o, 1.0, 0.0, n), every="epoch")
    callbacks = [schedule, Checkpoint(), rates]
    *_, told = fit(tmp_path, callbacks, epochs=3, eval_set=tiny.dataset(8), **SGD)
    assert rates.rates == [0.1] * 4 + [0.05] * 4
    assert any(line.endswith("over the 2 epochs that are left") for line in told.words)


def test_a_scheduler_that_is_made_already_has_its_rate(tmp_path):
    def run(epochs, override):
        net = tiny.model()
        optimizer = SGD["optimizer"](net)
        callbacks = [LRSchedule(StepLR(optimizer, 4)), Checkpoint()]
        return fit(tmp_path, callbacks, optimizer=optimizer, net=net, epochs=epochs, **override)

    def refused():
        return pytest.raises(ConfigError, match="and LRSchedule's scheduler goes on")

    another = {"override": {"lr": 0.5}}
    with refused():
        run(1, another)
    run(1, {})
    with refused():
        run(2, another)
    trainer, _, _ = run(2, {})
    with refused():
        trainer.fit(tiny.dataset(32), batch_size=8, epochs=3, override={"lr": 0.5})


def test_a_one_cycle_that_is_too_short_is_refused_before_the_first_step():
    net = tiny.model()
    optimizer = SGD["optimizer"](net)
    with pytest.raises(ConfigError, match="OneCycleLR is over after 3 steps"):
        fit(
            None,
            [LRSchedule(OneCycleLR(optimizer, 0.1, total_steps=3))],
            optimizer=optimizer,
            net=net,
        )
