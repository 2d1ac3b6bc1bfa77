"""Averages of the weights: by hand, at every world size, in evaluations and after a resume."""

import os

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import Checkpoint, EarlyStopping, GradientAccumulation
from dtrain.callbacks.ema import EMA
from dtrain.callbacks.stochastic_weight_averaging import StochasticWeightAveraging
from dtrain.errors import ConfigError, RemoteError
from dtrain.testing import run_outcomes, run_processes, run_ranks

BATCH = 24
EPOCHS = 3
STEPS = 12


def data():
    x, y = tiny.dataset(96).tensors
    return TensorDataset(x.double(), y)


def fit(callbacks, *, net=None, epochs=EPOCHS, eval_set=None, name=None, **options):
    trainer = tiny.trainer(callbacks, net=net or tiny.model(dtype=torch.float64), **options)
    result = trainer.fit(data(), batch_size=BATCH, epochs=epochs, eval_set=eval_set, name=name)
    return trainer, result


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def distance(ours, theirs):
    """The largest difference, relative to the tensor's norm."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).norm() / theirs[k].norm()) for k in theirs)


def same_bits(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


class Follow(dtrain.Callback):
    """Keeps the weights at the start, after each step, and at the end of each epoch."""

    def __init__(self, veto_at=()):
        self.veto_at = veto_at

    def on_fit_start(self, ctx):
        self.steps = [weights(ctx.model)]
        self.epochs = []

    def on_grads_ready(self, ctx, step):
        if step.number in self.veto_at:
            step.veto("as the test says")

    def on_step_end(self, ctx, step):
        if step.applied:
            self.steps.append(weights(ctx.model))

    def on_epoch_end(self, ctx):
        self.epochs.append(weights(ctx.model))


def ema_by_hand(steps, decay, warmup, every):
    average = dict(steps[0])
    for t, now in enumerate(steps[every::every]):
        d = min(decay, (1 + t) / (10 + t)) if warmup else decay
        average = {k: d * average[k] + (1 - d) * now[k] for k in now}
    return average


def mean_by_hand(several):
    return {k: sum(one[k] for one in several) / len(several) for k in several[0]}


def formulas():
    """Returns how far each average is from the formula, and the averages themselves."""
    distances, averages = {}, {}
    for decay, warmup, every, veto_at in (
        (0.9, False, 1, ()),
        (0.9, True, 1, ()),
        (0.1, True, 1, (4, 7)),
        (0.8, False, 5, ()),
    ):
        ema, follow = EMA(decay, warmup=warmup, every=every), Follow(veto_at)
        fit([ema, follow, GradientAccumulation(steps=2)])
        assert len(follow.steps) == 1 + STEPS - len(veto_at)
        assert ema.updates == (STEPS - len(veto_at)) // every
        case = f"ema {decay} {warmup} {every}"
        distances[case] = distance(ema.averages, ema_by_hand(follow.steps, decay, warmup, every))
        averages[case] = ema.averages
    for start, every_steps in ((1, None), (0, None), (1, 3)):
        swa, follow = StochasticWeightAveraging(start, every_steps=every_steps), Follow()
        trainer, _ = fit([swa, follow])
        first = start * STEPS // EPOCHS
        chosen = [
            follow.steps[k] for k in range(first + 1, STEPS + 1) if k % (every_steps or 4) == 0
        ]
        assert swa.count == len(chosen)
        assert every_steps or same_bits(chosen[-1], follow.epochs[-1])
        case = f"swa {start} {every_steps}"
        distances[case] = distance(swa.averages, mean_by_hand(chosen))
        assert same_bits(weights(trainer.model), swa.averages)
        averages[case] = swa.averages
    lists = {case: {k: v.tolist() for k, v in one.items()} for case, one in averages.items()}
    return distances, lists


def test_averages_are_those_of_the_formula_at_every_world_size():
    results = {size: run_processes(formulas, size, timeout_s=60) for size in (1, 2, 3)}
    alone = results[1][0][1]
    for by_rank in results.values():
        for distances, averages in by_rank:
            assert len(distances) == 7
            assert max(distances.values()) < 1e-12, distances
            assert averages == by_rank[0][1]
            for case, ours in averages.items():
                as_tensors = [
                    {k: torch.tensor(v, dtype=torch.float64) for k, v in one.items()}
                    for one in (ours, alone[case])
                ]
                assert distance(*as_tensors) < 1e-12, case


class Look(dtrain.Callback):
    """Keeps the weights that an evaluation sees, or that come after it."""

    def __init__(self, name):
        self.name = name
        self.seen = []

    def on_eval_end(self, ctx, metrics):
        self.seen.append((weights(ctx.model), metrics["eval/loss"]))


def loss_of(values):
    net = tiny.model(dtype=torch.float64)
    net.load_state_dict(values)
    x, y = data().tensors
    with torch.no_grad():
        return float(F.cross_entropy(net(x), y))


def evaluations():
    own = Follow()
    plain, _ = fit([own], eval_set=data())

    ema, inside, outside = EMA(0.9, use_at_end=False), Look("inside"), Look("outside")
    best = EarlyStopping("eval/loss", patience=99, restore_best=True)
    follow = Follow()
    trainer, result = fit([inside, ema, outside, follow], eval_set=data())
    assert len(inside.seen) == len(outside.seen) == EPOCHS
    for epoch in range(EPOCHS):
        upto = follow.steps[: (epoch + 1) * STEPS // EPOCHS + 1]
        seen, loss = inside.seen[epoch]
        assert distance(seen, ema_by_hand(upto, 0.9, True, 1)) < 1e-12
        assert abs(loss - loss_of(seen)) < 1e-12
        assert abs(loss - loss_of(upto[-1])) > 1e-4  # or the test could not tell them apart
        assert same_bits(outside.seen[epoch][0], seen)  # wherever it is in the list
    assert result.metrics["eval/loss"] == inside.seen[-1][1]
    # With and without: the same training, bit for bit.
    assert tiny.digest(trainer.model) == tiny.digest(plain.model)
    assert all(same_bits(a, b) for a, b in zip(follow.steps, own.steps, strict=True))

    # The averages at the end; and where the fit goes on, it is as if they had not been put in.
    used = EMA(0.9, use_at_end=True)
    trainer, _ = fit([used], name="main")
    assert same_bits(weights(trainer.model), used.averages)
    assert trainer.evaluate(data(), batch_size=48)["eval/loss"] == pytest.approx(
        loss_of(used.averages), rel=1e-12
    )
    trainer.fit(data(), batch_size=BATCH, epochs=5, name="main")
    whole = EMA(0.9, use_at_end=True)
    assert tiny.digest(trainer.model) == tiny.digest(fit([whole], epochs=5)[0].model)
    swa = StochasticWeightAveraging(1)
    trainer, _ = fit([swa], name="main")
    trainer.fit(data(), batch_size=BATCH, epochs=5, name="main")
    again, _ = fit([StochasticWeightAveraging(1)], epochs=5)
    assert tiny.digest(trainer.model) == tiny.digest(again.model)

    # Early stopping keeps the averages that were evaluated.
    seen = Look("seen")
    trainer, _ = fit([best, seen, EMA(0.9)], eval_set=data())
    kept = min(seen.seen, key=lambda one: one[1])
    assert same_bits(weights(trainer.model), kept[0])


class Failing:
    """An evaluation that fails on rank 0, the second time."""

    def __init__(self):
        self.calls = 0
        self.main = dtrain.init(seed=0).is_main

    def __call__(self, net, batch):
        self.calls += 1
        if self.main and self.calls == 6:  # four to an evaluation
            raise ValueError("planted")
        return tiny.loss_fn(net, batch)


def failing_evaluation():
    follow, ema = Follow(), EMA(0.9)
    trainer = tiny.trainer([ema, follow], net=tiny.model(dtype=torch.float64), eval_fn=Failing())
    with pytest.raises((ValueError, RemoteError), match="planted"):
        trainer.fit(data(), batch_size=BATCH, epochs=EPOCHS, eval_set=data())
    assert len(follow.steps) == 1 + 2 * STEPS // EPOCHS
    assert same_bits(weights(trainer.model), follow.steps[-1])
    assert not same_bits(ema.averages, follow.steps[-1])


class Norms(nn.Module):
    """Has a frozen parameter, a tied one, BatchNorm, and bfloat16 weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(8, 8).to(torch.bfloat16)
        self.second = nn.Linear(8, 8).to(torch.bfloat16)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        x = self.second(self.first(x.to(torch.bfloat16)).relu())
        return self.head(self.norm(x.float()))


class Unfreeze(dtrain.Callback):
    def on_epoch_start(self, ctx):
        ctx.model.head.bias.requires_grad_(ctx.progress.epoch > 0)


class Notes(dtrain.Sink):
    def __init__(self):
        self.texts = []

    def write(self, report):
        self.texts.append(report.text)


def odd_models():
    x, y = tiny.dataset(48).tensors
    follow, ema, swa, look = Follow(), EMA(0.5), StochasticWeightAveraging(1), Look("look")
    notes = Notes()
    dtrain.init(seed=0)
    net = Norms()
    trainer = dtrain.Trainer(
        net,
        torch.optim.SGD(net.parameters(), lr=0.1),
        tiny.loss_fn,
        callbacks=[Unfreeze(), follow, look, ema, swa],
        sinks=[notes],
    )
    trainer.fit(TensorDataset(x, y), batch_size=12, epochs=2, eval_set=TensorDataset(x, y))
    assert "second.weight" not in ema.averages  # tied: averaged once
    assert {ema.averages[k].dtype for k in ("first.weight", "first.bias")} == {torch.float32}
    for name, average in ema.averages.items():
        # The bias was frozen in the first epoch: its average began in the second.
        steps = follow.steps[4:] if name == "head.bias" else follow.steps
        several = [{name: one[name].double()} for one in steps]
        hand = ema_by_hand(several, 0.5, name != "head.bias", 1)[name]
        if name != "head.bias":  # its decay was not warmed up from the beginning
            assert (average.double() - hand).norm() <= 1e-6 * hand.norm()
        seen = look.seen[-1][0][name]
        assert torch.equal(seen, average.to(seen.dtype))
    trainer._engine.stand_in.take_out()  # as a further fit does
    assert same_bits(follow.epochs[-1], weights(net))
    assert "update_bn" in "".join(notes.texts) or not trainer.world.is_main

    late = StochasticWeightAveraging(7)
    notes = Notes()
    trainer = dtrain.Trainer(
        tiny.model(), tiny.adam, tiny.loss_fn, callbacks=[late, follow], sinks=[notes]
    )
    trainer.fit(TensorDataset(x, y), batch_size=12, epochs=1)
    assert same_bits(weights(trainer.model), follow.epochs[-1])
    assert "nothing was averaged" in "".join(notes.texts) or not trainer.world.is_main


def cases():
    evaluations()
    failing_evaluation()
    odd_models()


@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluations_see_the_averages_and_the_training_does_not(world_size):
    run_processes(cases, world_size, timeout_s=60)


class HeadInTheMiddle(dtrain.Callback):
    """Puts another head into the model in the middle of an epoch."""

    def __init__(self, at, classes):
        self.at, self.classes = at, classes

    def on_step_start(self, ctx, step):
        if step.number == self.at:
            old, new = ctx.model[2], nn.Linear(16, self.classes)
            ctx.model[2] = new
            group = ctx.optimizer.param_groups[0]
            gone = {*old.parameters()}
            group["params"] = [p for p in group["params"] if p not in gone] + [*new.parameters()]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_average_of_what_was_replaced_begins_anew(world_size, classes):
    def replace():
        ema, follow = EMA(0.5, warmup=False), Follow()
        callbacks = [ema, HeadInTheMiddle(2, classes), follow]
        trainer = tiny.trainer(callbacks, optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1))
        trainer.fit(tiny.dataset(48), batch_size=12, epochs=1)
        hand = ema_by_hand(follow.steps[3:], 0.5, False, 1)
        for name in ("2.weight", "2.bias"):
            assert torch.allclose(ema.averages[name], hand[name], rtol=1e-6)

    run_ranks(replace, world_size)


@pytest.mark.parametrize("make", [lambda: EMA(0.5), lambda: StochasticWeightAveraging(0)])
def test_a_part_of_another_name_or_shape_between_two_fits(make):
    for name in ("2", "other"):
        averaged = make()
        trainer = tiny.trainer([averaged], optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1))
        trainer.fit(tiny.dataset(48), batch_size=12, epochs=1)
        del trainer.model[2]
        trainer.model.add_module(name, nn.Linear(16, 3))
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1)
        trainer.fit(tiny.dataset(48), batch_size=12, epochs=2)
        assert averaged.averages.keys() == dict(trainer.model.named_parameters()).keys()


class Die(dtrain.Callback):
    """Ends the process at a place in the run, as kill -9 would."""

    def __init__(self, hook, at):
        self.hook, self.at = hook, at

    def on_step_end(self, ctx, step):
        if self.hook == "step" and ctx.progress.step == self.at:
            os._exit(9)

    def on_epoch_end(self, ctx):
        if self.hook == "epoch_end" and ctx.progress.epoch == self.at:
            os._exit(9)


def train(run_dir, hook="", at=0):
    ema, swa = EMA(0.9), StochasticWeightAveraging(1)
    steps = StochasticWeightAveraging(0, every_steps=2)
    steps.name = "by steps"
    callbacks = [ema, steps, swa, Checkpoint(every_steps=3, every_epochs=1), Die(hook, at)]
    trainer = tiny.trainer(callbacks, run_dir=run_dir)
    result = trainer.fit(tiny.dataset(50), batch_size=12, epochs=3, eval_set=tiny.dataset(50))
    counts = ema.updates, swa.count, steps.count
    averages = [{k: v.tolist() for k, v in one.averages.items()} for one in (ema, swa, steps)]
    return tiny.digest(trainer.model), counts, averages, result.metrics


def test_killed_and_started_again(tmp_path):
    whole = run_processes(train, 2, tmp_path / "whole", timeout_s=60)
    assert whole[0] == whole[1]
    assert whole[0][1] == (15, 2, 7)
    for hook, at in (("step", 4), ("epoch_end", 1)):
        run_dir = tmp_path / f"{hook}-{at}"
        killed = run_outcomes(train, 2, run_dir, hook, at, timeout_s=60)
        assert {outcome.exitcode for outcome in killed} == {9}
        assert run_processes(train, 2, run_dir, timeout_s=60) == whole


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EMA(1.0), "less than 1"),
        (lambda: EMA(-0.1), "less than 1"),
        (lambda: EMA(every=0), "1 or more"),
        (lambda: StochasticWeightAveraging(-1), "0 or more"),
        (lambda: StochasticWeightAveraging(1, every_steps=0), "1 or more"),
    ],
)
def test_wrong_arguments_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_warmup_as_documented():
    assert EMA(0.999).decay_at(0) == 0.1
    assert EMA(0.999).decay_at(90) == 91 / 100
    assert EMA(0.999).decay_at(10**6) == 0.999
    assert EMA(0.999, warmup=False).decay_at(0) == 0.999


# --------------------------------------------------------------------------- replaced parameters


class NewHead(dtrain.Callback):
    """Replaces the last layer, in a step or where an epoch begins; ``parts`` are new layers."""

    def __init__(self, *parts, at=(1, 1)):
        self.parts, self.at = parts, at

    def on_epoch_start(self, ctx):
        if (ctx.progress.epoch, None) == self.at:
            self.replace(ctx)

    def on_step_start(self, ctx, step):
        if (ctx.progress.epoch, ctx.progress.step_in_epoch) == self.at:
            self.replace(ctx)

    def replace(self, ctx):
        torch.manual_seed(5)
        group, old = ctx.optimizer.param_groups[0], {*ctx.model[2].parameters()}
        layers = [nn.Linear(*sizes, dtype=torch.float64) for sizes in self.parts]
        ctx.model[2] = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
        kept = [p for p in group["params"] if p not in old]
        group["params"] = [*kept, *ctx.model[2].parameters()]


class ByHand(Follow):
    """The average, as one would write it; of a new parameter, from the end of its first step on."""

    def on_step_end(self, ctx, step):
        old, before = getattr(self, "average", {}) or self.steps[0], getattr(self, "before", {})
        new, self.before = weights(ctx.model), dict(ctx.model.named_parameters())
        same = {k: old[k] for k, p in self.before.items() if k in old and before.get(k, p) is p}
        self.average = {k: 0.5 * same.get(k, p) + 0.5 * p for k, p in new.items()}


class NewHeadOfEachRank(NewHead):
    def replace(self, ctx):
        super().replace(ctx)
        with torch.no_grad():
            for p in ctx.model[2].parameters():
                p.add_(dtrain.init().rank)


def replaced_by_each_rank(order):
    head = NewHeadOfEachRank((16, 4), (4, 2), at=(1, None))
    cast = {"ema": EMA(0.5), "head": head}
    trainer, _ = fit([cast[name] for name in order])
    return tiny.digest(trainer.model)


def test_averages_of_new_parameters_are_equal_on_all_ranks():
    for order in (("ema", "head"), ("head", "ema")):
        assert len(set(run_ranks(replaced_by_each_rank, 2, order))) == 1


def replaced(order, at, *parts):
    cast = {"ema": EMA(0.5, warmup=False), "head": NewHead(*parts, at=at), "hand": ByHand()}
    fit([cast[name] for name in order], strategy="flat")
    ours, theirs = cast["ema"].averages, cast["hand"].average
    assert ours.keys() == theirs.keys()
    # A new name's average begins before its first step where EMA has seen it by then.
    known = [k for k in theirs if k.startswith("0.") or len(parts) == 1]
    return distance({k: ours[k] for k in known}, {k: theirs[k] for k in known})


@pytest.mark.parametrize("at", [(1, 1), (1, None)], ids=["in a step", "in an epoch's beginning"])
@pytest.mark.parametrize("parts", [[(16, 2)], [(16, 4), (4, 2)]], ids=["same names", "others"])
def test_an_average_follows_parameters_that_are_replaced(at, parts):
    for order in (("ema", "head", "hand"), ("head", "ema", "hand")):
        assert all(far < 1e-12 for far in run_ranks(replaced, 2, order, at, *parts))
