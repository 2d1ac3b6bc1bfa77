"""`optimizer={...}`: a loss function that yields; each update reduced, agreed and stepped apart."""

import json
import re
from functools import cache

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR
from torch.profiler import ProfilerActivity, profile

import dtrain
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    ClipGradients,
    Freeze,
    GradientAccumulation,
    GradientStats,
    LossSpikeGuard,
    LRSchedule,
    MixedPrecision,
    NonFiniteGuard,
    ParamSchedule,
)
from dtrain.errors import ConfigError, LossError, RankMismatch
from dtrain.strategies import DDP
from dtrain.testing import run_processes, run_ranks, try_ranks

STEPS = 12


def nets():
    torch.manual_seed(1)
    generator = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8))
    critic = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))
    return nn.ModuleDict({"g": generator, "d": critic}).double()


def optimizers(model):
    return {
        "d": AdamW(model["d"].parameters(), lr=1e-2),
        "g": SGD(model["g"].parameters(), lr=0.1, momentum=0.9),
    }


def losses(model, batch):
    """A GAN's two losses; the second asks the critic anew, after its update."""
    x = batch[0].double()
    fake = model["g"](x.flip(1))
    yield "d", F.softplus(-model["d"](x)).mean() + F.softplus(model["d"](fake.detach())).mean()
    size = fake.detach().square().mean()
    yield "g", dtrain.Loss(F.softplus(-model["d"](fake)).mean(), metrics={"size": size})


def planned(model, batch, ctx):
    """The same, with the generator's turn in every third step only."""
    made = losses(model, batch)
    yield next(made)
    if ctx.progress.step % 3 == 2:
        yield next(made)


def plan(progress):
    return ("d", "g") if progress.step % 3 == 2 else ("d",)


def trainer(callbacks=(), loss=losses, optimizer=optimizers, strategy="auto", **options):
    dtrain.init(seed=0)
    options = {"sinks": [], "callbacks": callbacks, "strategy": strategy} | options
    return dtrain.Trainer(nets(), optimizer, loss, **options)


def params_of(run):
    return {n: p.detach().clone() for n, p in run.model.named_parameters()}


def train(strategy="auto", micros=1, batch_size=14, loss=losses, updates=None, more=()):
    callbacks = [
        *([GradientAccumulation(micros)] if micros > 1 else []),
        ClipGradients(0.3, optimizer="g"),
        LRSchedule(lambda opt, steps: ExponentialLR(opt, 0.9), optimizer="g"),
        ParamSchedule("weight_decay", lambda p: 0.01 * p.step, optimizer="d"),
        *more,
    ]
    run = trainer(callbacks, loss, strategy=strategy, updates=updates)
    result = run.fit(tiny.dataset(50), batch_size=batch_size, max_steps=STEPS, log_every=5)
    return params_of(run), result


@cache
def by_hand(batch_size=14, updates=None, freezes=None):
    """The same in plain torch, on the batches that dtrain makes."""
    batches = []

    class See(dtrain.Callback):
        def on_batch(self, ctx, step):
            batches.append(step.batch)

    train(batch_size=batch_size, more=[See()])
    model = nets()
    opts = optimizers(model)
    for number, batch in enumerate(batches):
        opts["d"].param_groups[0]["weight_decay"] = 0.01 * number
        opts["g"].param_groups[0]["lr"] = 0.1 * 0.9**number
        names = ("d", "g") if updates is None else updates(dtrain.Progress(step=number))
        if freezes:
            model.get_submodule(freezes).requires_grad_(not is_frozen(number))
        for name, loss in losses(model, batch):
            if name not in names:
                break
            for one in opts.values():
                one.zero_grad()
            loss = loss.mean if isinstance(loss, dtrain.Loss) else loss
            loss.backward(retain_graph=True)
            if name == "g":
                torch.nn.utils.clip_grad_norm_(model["g"].parameters(), 0.3)
            opts[name].step()
    return {n: p.detach() for n, p in model.named_parameters()}


CASES = [(1, "flat", 3), (2, "flat", 2), (2, "ddp", 1), (3, "ddp", 2), (3, "flat", 1)]


@pytest.mark.parametrize(("world_size", "strategy", "micros"), CASES)
def test_the_parameters_are_those_of_a_loop_by_hand(world_size, strategy, micros):
    def check(ranks, expected):
        for params, _ in ranks:
            for name, value in params.items():
                assert (value - expected[name]).norm() <= 1e-12 * expected[name].norm(), name
                assert torch.equal(value, ranks[0][0][name])

    several = run_processes(train_three, world_size, strategy, micros, timeout_s=60)
    check([found[0] for found in several], by_hand())
    check([found[1] for found in several], by_hand(updates=plan))
    check([found[2] for found in several], by_hand(batch_size=2))  # some ranks idle


def train_three(strategy, micros):
    return (
        train(strategy, micros),
        train(strategy, micros, loss=planned, updates=plan),
        train(strategy, micros, batch_size=2),
    )


def test_figures_are_those_of_each_update():
    _, result = train(loss=planned, updates=plan)
    rows = [row for row in result.history if "train/d/loss" in row]
    assert {"train/d/loss", "lr/d", "lr/g", "grad_norm/g", "train/g/size"} <= rows[-1].keys()
    assert not {"train/loss", "lr", "grad_norm"} & rows[-1].keys()
    assert result.updates == STEPS
    assert result.metrics["lr/g"] == pytest.approx(0.1 * 0.9 ** (STEPS - 1))


class Raise(Exception):
    pass


def failing(where):
    """A loss function that goes wrong on rank 1, in step 2."""

    def loss(model, batch, ctx):
        wrong = ctx.progress.step == 2 and dtrain.init().rank == 1
        made = losses(model, batch)
        if wrong and where == "first":
            raise Raise("planted")
        name, value = next(made)
        yield ("g" if wrong and where == "name" else name), value
        if wrong and where == "second":
            raise Raise("planted")
        if wrong and where == "short":
            return
        yield next(made)
        if wrong and where == "end":
            raise Raise("planted")
        if wrong and where == "long":
            yield "d", model["d"](batch[0].double()).mean()

    return loss


FAILURES = {
    "first": ("failed in loss_fn (update 'd') at step 2: Raise: planted", "saved in"),
    "second": (
        "failed in loss_fn (update 'g') at step 2: Raise: planted",
        "of step 2, the update 'd' was applied before update 'g' failed",
    ),
    "end": ("failed in loss_fn", ""),
    "name": ("yielded g, and the plan of this step is d -> g -> its end", "saved in"),
    "short": ("yielded d -> its end, and the plan of this step is d -> g -> its end", "of step 2"),
    "long": ("yielded d -> g -> d, and the plan of this step is d -> g -> its end", ""),
}


def fail(where, strategy, run_dir, micros):
    run = trainer(
        [GradientAccumulation(micros), Checkpoint()],
        failing(where),
        strategy=strategy,
        run_dir=run_dir,
    )
    try:
        run.fit(tiny.dataset(50), batch_size=14, max_steps=STEPS)
    except Exception as error:  # noqa: BLE001 -- looked at
        return type(error).__name__, f"{error}\n" + "\n".join(getattr(error, "__notes__", []))
    return None


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
@pytest.mark.parametrize("where", FAILURES)
def test_what_goes_wrong_on_one_rank_is_raised_on_all(tmp_path, where, strategy):
    words, note = FAILURES[where]
    found = run_ranks(fail, 3, where, strategy, tmp_path, 2, timeout_s=30)
    kinds = [kind for kind, _ in found]
    expected = "LossError" if where in ("name", "short", "long") else "Raise"
    assert kinds == ["RemoteError", expected, "RemoteError"]
    assert words in found[0][1]
    assert words in found[2][1]
    assert note in found[0][1], found[0][1]
    partly = where in ("second", "short")
    assert (tmp_path / "emergency").exists() == (not partly)


def test_two_processes_learn_of_it_too(tmp_path):
    for kind, words in run_processes(fail, 2, "second", "ddp", tmp_path, 1, timeout_s=60):
        assert kind in ("Raise", "RemoteError")
        assert "the update 'd' was applied before update 'g' failed" in words


class Skip(dtrain.Callback):
    """Skips rank 1's micro-batches of odd steps, in one hook and update."""

    def __init__(self, hook, update):
        self.where = hook, update

    def on_batch(self, ctx, step):
        self.look("on_batch", ctx, step)

    def on_loss(self, ctx, step):
        self.look("on_loss", ctx, step)

    def look(self, hook, ctx, step):
        if (hook, step.update) == self.where and step.number % 2 and dtrain.init().rank == 1:
            ctx.request.skip("told to")


def skipped(hook, update, strategy):
    seen = []

    class See(dtrain.Callback):
        def on_batch(self, ctx, step):
            seen.append(step.batch)

    run = trainer([See(), Skip(hook, update)], strategy=strategy)
    run.fit(tiny.dataset(48), batch_size=16, max_steps=4)
    return params_of(run), seen


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
@pytest.mark.parametrize(
    ("hook", "update", "left"),
    [("on_batch", "d", "dg"), ("on_loss", "d", "d"), ("on_loss", "g", "g")],
)
def test_a_skip_leaves_out_what_it_says(hook, update, left, strategy):
    ranks = run_ranks(skipped, 2, hook, update, strategy)
    model = nets()
    opts = optimizers(model)
    for number, (mine, theirs) in enumerate(zip(ranks[0][1], ranks[1][1], strict=True)):
        made = [losses(model, mine), losses(model, theirs)]
        for name in ("d", "g"):
            each = [next(one)[1] for one in made]
            each = [one.mean if isinstance(one, dtrain.Loss) else one for one in each]
            used = each[:1] if number % 2 and name in left else each
            opts[name].zero_grad()
            torch.stack(used).mean().backward(inputs=[*model[name].parameters()])
            opts[name].step()
    for name, value in model.named_parameters():
        assert torch.allclose(ranks[0][0][name], value, rtol=1e-12, atol=1e-14), name
        assert torch.equal(ranks[0][0][name], ranks[1][0][name])


def stopped(strategy):
    def loss(model, batch, ctx):
        made = losses(model, batch)
        yield next(made)
        if ctx.progress.step == 3 and dtrain.init().rank == 1:
            ctx.request.stop("enough")
        yield next(made)

    run = trainer(loss=loss, strategy=strategy)
    result = run.fit(tiny.dataset(48), batch_size=16, max_steps=STEPS)
    return result.steps, result.stop_reason


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_a_stop_asked_for_in_a_later_update_is_heard(strategy):
    for steps, why in run_ranks(stopped, 3, strategy):
        assert steps == 4
        assert "asked by rank 1" in why


def test_a_veto_is_of_one_update():
    class Veto(dtrain.Callback):
        def on_grads_ready(self, ctx, step):
            grads = {n[0] for n, p in ctx.model.named_parameters() if p.grad is not None}
            seen.append((step.update, grads))
            if step.update == "g":
                step.veto("always")

        def on_step_end(self, ctx, step):
            ends.append((step.update, step.applied, step.applied_to("d"), step.applied_to("g")))

    seen, ends = [], []
    start = dict(nets().named_parameters())
    run = trainer([Veto(), EMA(0.5)])
    result = run.fit(tiny.dataset(48), batch_size=16, max_steps=2)
    assert seen == [("d", {"d"}), ("g", {"g"})] * 2
    assert ends == [("g", True, True, False)] * 2
    assert result.updates == 2
    raw = {n: p.detach() for n, p in run.model.named_parameters()}
    moved = {name: not torch.equal(raw[name], value) for name, value in start.items()}
    assert moved == {name: name.startswith("d") for name in start}


def resumable(run_dir, stop_at=None, strategy="auto"):
    class Leave(dtrain.Callback):
        def on_step_end(self, ctx, step):
            if step.number + 1 == stop_at:
                ctx.request.preempt("told to")

    def loss(model, batch, ctx):
        batch = (batch[0] + 0.1 * torch.randn(batch[0].shape, generator=ctx.rng), batch[1])
        yield from planned(model, batch, ctx)

    callbacks = [
        GradientAccumulation(2),
        LRSchedule(lambda opt, steps: ExponentialLR(opt, 0.9), optimizer="g"),
        NonFiniteGuard(),
        LossSpikeGuard(window=4, optimizer="d"),
        GradientStats(optimizer="g"),
        EMA(0.9),
        Checkpoint(every_steps=50),
        Leave(),
    ]
    run = trainer(callbacks, loss, run_dir=run_dir, updates=plan, strategy=strategy)
    result = run.fit(tiny.dataset(50), batch_size=14, max_steps=STEPS, log_every=1)
    states = [one.state_dict() for one in run.context.optimizers.values()]
    return params_of(run), states, [row for row in result.history if row["step"] > 4]


def interrupted(run_dir, strategy):
    resumable(run_dir, 4, strategy)
    return resumable(run_dir, None, strategy)


@pytest.mark.parametrize(("world_size", "strategy"), [(1, "flat"), (2, "ddp"), (3, "flat")])
def test_a_run_that_goes_on_ends_with_the_same_bits(tmp_path, world_size, strategy):
    whole = run_ranks(resumable, world_size, tmp_path / "whole", None, strategy)
    parts = run_ranks(interrupted, world_size, tmp_path / "parts", strategy)
    for mine, others in zip(whole, parts, strict=True):
        (params, states, rows), (theirs, their_states, their_rows) = mine, others
        assert all(torch.equal(theirs[name], value) for name, value in params.items())
        flat = [repr(sorted(flatten(one))) for one in (*states, *their_states)]
        assert flat[:2] == flat[2:]
        assert rows == their_rows
    fingerprint = json.loads((tmp_path / "parts/status.json").read_text())["fingerprint"]
    assert fingerprint["optimizer"] == "d: AdamW, g: SGD"


def flatten(state, path=""):
    for name, value in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(value, dict | list):
            yield from flatten(value, f"{path}/{name}")
        else:
            yield f"{path}/{name}", value.tolist() if isinstance(value, torch.Tensor) else value


def test_a_loss_scale_vetoes_one_update():
    def loss(model, batch, ctx):
        fake = model["g"](batch[0])
        yield "d", model["d"](fake.detach()).float().mean()
        big = 1e9 if ctx.progress.step < 2 else 1
        yield "g", model["d"](fake).float().mean() * big

    class Look(dtrain.Callback):
        def on_step_end(self, ctx, step):
            found.append((step.applied_to("d"), step.applied_to("g")))

    found = []
    model = nets().float()
    opts = {name: AdamW(model[name].parameters(), fused=True) for name in ("d", "g")}
    precision = MixedPrecision("fp16", init_scale=4.0)
    run = dtrain.Trainer(model, opts, loss, callbacks=[precision, Look()], sinks=[])
    result = run.fit(tiny.dataset(48), batch_size=16, max_steps=4)
    assert found == [(True, False), (True, False), (True, True), (True, True)]
    assert result.metrics["loss_scale"] == 1.0
    assert result.metrics["updates"] == 4


def test_a_guard_of_one_update_leaves_the_other_alone():
    class Bad(dtrain.Callback):
        def on_loss(self, ctx, step):
            if step.number in (1, 2):
                step.loss = dtrain.Loss(step.loss.mean * float("nan"), step.loss.weight)

        def on_grads_ready(self, ctx, step):
            if step.update == "g" and step.number == 1:
                step.veto("planted")  # by somebody else

    words = tiny.Words()
    run = trainer([Bad(), NonFiniteGuard("skip", optimizer="d")], losses, sinks=[words])
    run.fit(tiny.dataset(48), batch_size=16, max_steps=2)
    assert sum("update 'd': rank 0" in line for line in words.words) == 1
    assert not any("update 'g': rank 0" in line for line in words.words)
    with pytest.raises(ConfigError, match="there is one loss for all optimizers"):
        tiny.trainer([NonFiniteGuard(optimizer=0)]).fit(tiny.dataset(24), batch_size=12, epochs=1)


def test_a_guard_names_the_update():
    def loss(model, batch, ctx):
        made = losses(model, batch)
        yield next(made)
        name, value = next(made)
        yield name, value.mean * (float("nan") if ctx.progress.step == 1 else 1)

    words = tiny.Words()
    run = trainer([NonFiniteGuard("skip")], loss, sinks=[words])
    run.fit(tiny.dataset(48), batch_size=16, max_steps=3)
    told = "\n".join(words.words)
    assert "step 1, update 'g': rank 0, micro-batch 0: the loss is NaN" in told
    assert "Its update is left out" in told
    assert "warning: the loss of update 'g' is not finite at step 1" in told


class Counts(dtrain.Callback):
    """Counts the reductions of step 1, as torch's profiler sees them."""

    def on_step_start(self, ctx, step):
        if step.number == 1:
            self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self.profile.__enter__()

    def on_step_end(self, ctx, step):
        if step.number == 1:
            self.profile.__exit__(None, None, None)
            seen = [one for one in self.profile.events() if one.name.startswith("gloo:")]
            self.sizes = [one.input_shapes[0][0] for one in seen if one.input_shapes[0]]


def counted(strategy):
    counts = Counts()
    run = trainer([counts], strategy=strategy)
    run.fit(tiny.dataset(48), batch_size=16, max_steps=3)
    sizes = {n: sum(p.numel() for p in run.model[n].parameters()) for n in ("d", "g")}
    return counts.sizes, [sizes["d"], sizes["g"]], run._engine.lane.param.numel()


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_an_update_reduces_its_own_parameters_once(strategy):
    for found, sizes, lane in run_processes(counted, 2, strategy, timeout_s=60):
        assert found == [size + lane for size in sizes]


def test_parts_of_a_graph_that_both_losses_share_are_kept():
    """Not detached: only the update's own parameters get a gradient, and nothing else is freed."""

    def loss(model, batch):
        fake = model["g"](batch[0].double())
        yield "d", model["d"](fake).mean()
        yield "g", model["d"](fake).square().mean()

    run = trainer(loss=loss)
    run.fit(tiny.dataset(48), batch_size=16, max_steps=2)


def test_what_cannot_be_is_refused():
    def refused(kind, match, **options):
        with pytest.raises(kind, match=match):
            trainer(**options).fit(tiny.dataset(48), batch_size=16, max_steps=1, **fit)

    fit = {}
    refused(LossError, "loss_fn has a yield", optimizer=lambda m: AdamW(m.parameters()))
    refused(
        LossError,
        "loss_fn returned Tensor; with optimizer=",
        loss=lambda m, b: m["d"](b[0].double()).mean(),
    )
    refused(
        LossError,
        "yielded Tensor, not a name",
        loss=lambda m, b: iter_of(m["d"](b[0].double()).mean()),
    )
    refused(ConfigError, r"updates=...\) returned \('x',\).*'d', 'g'", updates=lambda p: ("x",))
    refused(ConfigError, r"returned 'd' for step 0", updates=lambda p: "d")
    refused(
        ConfigError,
        "is for named optimizers",
        updates=plan,
        optimizer=lambda m: AdamW(m.parameters()),
    )
    refused(ConfigError, "cannot capture a loss function that yields", graph=True)
    refused(
        ConfigError,
        "in several of the optimizers",
        optimizer=lambda m: {"d": AdamW(m.parameters()), "g": AdamW(m["g"].parameters())},
    )
    refused(ConfigError, "named 'a b'", optimizer=lambda m: {"a b": AdamW(m.parameters())})
    refused(
        ConfigError,
        "optimizer='x': there is no such",
        callbacks=[ClipGradients(1.0, optimizer="x")],
    )
    refused(ConfigError, "LossSpikeGuard.optimizer='d'", callbacks=[LossSpikeGuard()])
    fit = {"eval_set": tiny.dataset(8)}  # before anything is trained
    refused(ConfigError, r"cannot evaluate: pass Trainer\(eval_fn=...\)")


def iter_of(*values):
    yield from values


def test_ranks_with_different_plans_are_told_at_the_start():
    def fit():
        mine = dtrain.init().rank
        run = trainer(updates=lambda progress: ("d", "g") if progress.step % 3 == mine else ("d",))
        run.fit(tiny.dataset(48), batch_size=16, max_steps=3)

    for one in try_ranks(fit, 2):
        assert isinstance(one.error, RankMismatch)
        assert re.search(r"rank 1: updates: d; d, g; d", str(one.error))


class Stream:
    """So many batches of 4, of each rank's own."""

    def __init__(self, lengths):
        self.rank, self.count = dtrain.init().rank, lengths[dtrain.init().rank]

    def __iter__(self):
        x, y = tiny.dataset(64).tensors
        for number in range(self.count):
            at = 32 * self.rank + 4 * number
            yield x[at : at + 4], y[at : at + 4]


def streamed(lengths, strategy):
    run = trainer(strategy=strategy)
    result = run.fit(dtrain.Data(Stream(lengths)), epochs=2)
    return params_of(run), result.steps


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
def test_a_rank_whose_stream_has_ended_idles_in_each_update(strategy):
    ranks = run_ranks(streamed, 2, (4, 2), strategy)
    model = nets()
    opts = optimizers(model)
    x, y = tiny.dataset(64).tensors
    for number in (0, 1, 2, 3) * 2:
        rows = [*range(4 * number, 4 * number + 4)]
        rows += [32 + row for row in rows] if number < 2 else []
        for name, loss in losses(model, (x[rows], y[rows])):
            opts[name].zero_grad()
            loss = loss.mean if isinstance(loss, dtrain.Loss) else loss
            loss.backward(inputs=[*model[name].parameters()])
            opts[name].step()
    for params, steps in ranks:
        assert steps == 8
        for name, value in model.named_parameters():
            assert torch.allclose(params[name], value, rtol=1e-12, atol=1e-14), name


def gathering():
    def loss(model, batch, ctx):
        x = batch[0].double()
        yield "d", model["d"](x).square().mean()
        mine = F.normalize(model["g"](x), dim=1)
        every = ctx.comm.gather_with_grad("rows", mine)
        yield "g", (mine @ every.T).square().mean()

    run = trainer(loss=loss)
    run.fit(tiny.dataset(50), batch_size=12, max_steps=6)  # the last batch of an epoch is of 2
    return params_of(run)


def test_a_later_update_may_gather_from_all_ranks():
    (alone,) = run_ranks(gathering, 1)
    for params in run_ranks(gathering, 3):
        assert all(torch.allclose(params[n], p, rtol=1e-10, atol=1e-12) for n, p in alone.items())


def test_an_update_may_come_twice_in_a_step():
    def loss(model, batch):
        x = batch[0].double()
        for _ in range(2):
            yield "d", model["d"](x).square().mean()
        yield "g", model["g"](x).square().mean()

    run = trainer(loss=loss, updates=lambda progress: ("d", "d", "g"))
    run.fit(tiny.dataset(48), batch_size=16, max_steps=2)
    state = run.context.optimizers["d"].state
    assert {int(one["step"]) for one in state.values()} == {4}


def test_an_evaluation_has_a_function_of_its_own():
    run = trainer(eval_fn=lambda model, batch: model["d"](batch[0].double()).square().mean())
    result = run.fit(tiny.dataset(48), batch_size=16, epochs=1, eval_set=tiny.dataset(16))
    assert result.metrics["eval/loss"] > 0
    assert "epoch/g/loss" in result.metrics


def warmed_up(strategy, plan):
    """The critic learns alone in the first epoch, in which the generator is frozen."""

    def loss(model, batch, ctx):
        made = losses(model, batch)
        yield next(made)
        if ctx.progress.epoch:
            yield next(made)

    run = trainer([Freeze("g.*", until_epoch=1)], loss, strategy=strategy, updates=plan)
    before = params_of(run)
    run.fit(tiny.dataset(48), batch_size=16, epochs=1)
    first = params_of(run)
    run.fit(tiny.dataset(48), batch_size=16, epochs=2)
    moved = [
        {n for n in one if not torch.equal(one[n], two[n])}
        for one, two in ((before, first), (first, params_of(run)))
    ]
    return moved


@pytest.mark.parametrize(("world_size", "strategy"), [(1, "flat"), (2, "flat"), (2, "ddp")])
def test_a_frozen_network_is_left_alone(world_size, strategy):
    def by_epoch(progress):
        return ("d", "g") if progress.epoch else ("d",)

    names = {name for name, _ in nets().named_parameters()}
    for first, second in run_ranks(warmed_up, world_size, strategy, by_epoch):
        assert first == {name for name in names if name.startswith("d")}
        assert second == names
    words = "step 0 has update 'g', and every parameter of that optimizer is frozen"
    for one in try_ranks(warmed_up, world_size, strategy, None):
        assert words in str(one.error)


class Freezes(dtrain.Callback):
    """Freezes the generator, or its first layer, for some steps: across an epoch's end, or not."""

    def __init__(self, hook, name):
        self.hook, self.name = hook, name

    def on_step_start(self, ctx, step):
        self.look("on_step_start", ctx)

    def on_step_end(self, ctx, step):
        self.look("on_step_end", ctx)

    def look(self, hook, ctx):
        if hook == self.hook:
            freezes = is_frozen(ctx.progress.step)
            ctx.model.get_submodule(self.name).requires_grad_(not freezes)


def is_frozen(step):
    return step in (3, 4, 5, 9, 10)  # an epoch has four steps


def without_frozen(progress):
    return ("d",) if is_frozen(progress.step) else ("d", "g")


def by_plan(model, batch, ctx):
    made = losses(model, batch)
    yield next(made)
    if "g" in without_frozen(ctx.progress):
        yield next(made)


def toggled(model, batch):
    """As GANs are written elsewhere: what the other loss must not reach is frozen."""
    x = batch[0].double()
    fake = model["g"](x.flip(1))
    model["d"].requires_grad_(True)
    model["g"].requires_grad_(False)
    yield "d", F.softplus(-model["d"](x)).mean() + F.softplus(model["d"](fake.detach())).mean()
    model["g"].requires_grad_(True)
    model["d"].requires_grad_(False)
    yield "g", F.softplus(-model["d"](fake)).mean()


FROZEN = [
    (Freezes("on_step_start", "g"), by_plan, without_frozen),
    (Freezes("on_step_end", "g"), by_plan, without_frozen),
    (Freezes("on_step_start", "g.0"), losses, None),
]


def train_frozen(strategy, micros):
    found = [
        train(strategy, micros, loss=loss, updates=updates, more=[freezes])[0]
        for freezes, loss, updates in FROZEN
    ]
    # Ranks without a batch have frozen nothing, and an epoch begins with what the last step left.
    return found, [train(strategy, micros, size, loss=toggled)[0] for size in (14, 2)]


@cache
def frozen_by_hand():
    return [by_hand(freezes=one.name, updates=updates) for one, _, updates in FROZEN]


@pytest.mark.parametrize(
    ("world_size", "strategy", "micros"),
    [pytest.param(1, "flat", 2, marks=pytest.mark.slow), (2, "ddp", 2), (3, "flat", 1)],
)
def test_networks_are_frozen_and_thawed_in_the_middle_of_an_epoch(world_size, strategy, micros):
    expected = [*frozen_by_hand(), by_hand(), by_hand(batch_size=2)]
    for by_hook, by_loss in run_processes(train_frozen, world_size, strategy, micros, timeout_s=60):
        for params, truth in zip([*by_hook, *by_loss], expected, strict=True):
            for name, value in params.items():
                assert (value - truth[name]).norm() <= 1e-12 * truth[name].norm(), name


def moving(model, batch):
    yield from losses(model, batch)
    with torch.no_grad():
        model["d"][0].weight.mul_(0.99)


@pytest.mark.parametrize(
    ("loss", "note"),
    [
        (toggled, "note: the loss function switched requires_grad"),
        (moving, "warning: the loss function changes parameters, which it does once for each"),
    ],
)
def test_what_the_loss_function_does_to_parameters_is_told_once(loss, note):
    words = tiny.Words()
    run = trainer(loss=loss, sinks=[words])
    run.fit(tiny.dataset(48), batch_size=16, max_steps=4)
    assert "\n".join(words.words).count(note) == 1


def test_a_spike_of_one_update_leaves_out_that_one():
    def loss(model, batch, ctx):
        for name, value in losses(model, batch):
            yield name, value * 50 if name == "d" and ctx.progress.step == 5 else value

    class Look(dtrain.Callback):
        def on_step_end(self, ctx, step):
            found.append((step.applied_to("d"), step.applied_to("g")))

    found, words = [], tiny.Words()
    run = trainer([LossSpikeGuard(50, window=4, optimizer="d"), Look()], loss, sinks=[words])
    run.fit(tiny.dataset(48), batch_size=16, max_steps=7)
    assert found == [(True, True)] * 5 + [(False, True), (True, True)]
    assert re.search(r"step 5: the loss \S+ of update 'd' is above", "\n".join(words.words))


def clearing(how, strategy):
    def loss(model, batch, ctx):
        made = losses(model, batch)
        for name, value in made:
            if name == "g" and dtrain.init().rank == 1:
                if how == "model":
                    model.zero_grad()
                else:
                    ctx.optimizers["g"].zero_grad(set_to_none=False)
            yield name, value

    trainer([GradientAccumulation(2)], loss, strategy=strategy).fit(
        tiny.dataset(48), batch_size=16, max_steps=2
    )


@pytest.mark.parametrize(("how", "strategy"), [("model", "flat"), ("optimizer", "ddp")])
def test_gradients_that_a_loss_function_clears_amid_a_step_are_an_error(how, strategy):
    for one in try_ranks(clearing, 2, how, strategy):
        assert "gradients of this step's earlier micro-batches were cleared" in str(one.error)


def unused(strategy):
    def loss(model, batch):
        x = batch[0].double()
        yield "d", model["d"](x).mean()
        yield "g", model["g"][0](x).mean()

    run = trainer(loss=loss, strategy=strategy)
    run.fit(tiny.dataset(48), batch_size=16, max_steps=1)


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_parameter_that_an_update_does_not_reach_is_named(world_size, strategy):
    for one in try_ranks(unused, world_size, strategy):
        assert "no gradient reached g.2.weight, g.2.bias" in str(one.error)


def with_options():
    return [
        train(DDP(**options))[0]
        for options in ({"find_unused_parameters": True}, {"static_graph": True}, {})
    ]


def test_options_of_ddp_change_nothing():
    for unused, static, plain in run_processes(with_options, 2, timeout_s=60):
        for name, value in plain.items():
            assert torch.equal(unused[name], value)
            assert torch.equal(static[name], value)
