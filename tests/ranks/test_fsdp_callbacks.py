"""Callbacks that work on weights and gradients, where each rank holds rows: as on one process."""

import pytest
import sharding
import torch
from sharding import distance, make, strategy_of, whole
from torch.optim.lr_scheduler import CosineAnnealingLR

import dtrain
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    ClipGradients,
    EarlyStopping,
    Freeze,
    GradientNoise,
    GradientStats,
    L1L2Penalty,
    LRSchedule,
    StochasticWeightAveraging,
)
from dtrain.testing import run_processes

EXACT = 1e-12
SLOW = {"marks": pytest.mark.slow}


class Toggles(dtrain.Callback):
    """Freezes a block where a step begins, and thaws it where another has ended."""

    def on_step_start(self, ctx, step):
        if step.number == 1:
            ctx.model.blocks[0].requires_grad_(False)

    def on_step_end(self, ctx, step):
        if step.number == 3:
            ctx.model.blocks[0].requires_grad_(True)


MAKE = {
    "toggles": Toggles,
    "ema": lambda: EMA(0.8),
    "ema aside": lambda: EMA(0.9, every=2, use_at_end=False),
    "swa": lambda: StochasticWeightAveraging(1),
    "swa by steps": lambda: StochasticWeightAveraging(0, every_steps=3),
    "noise": lambda: GradientNoise(0.1),
    "penalty": lambda: L1L2Penalty(l1=1e-2, l2=1e-1),
    "l1 of all": lambda: L1L2Penalty(l1=1e-2, params=lambda name, p: True),
    "best": lambda: EarlyStopping("eval/loss", patience=9, restore_best=True),
    "stats": lambda: GradientStats(every=1),
    "clip first": lambda: ClipGradients(0.02, optimizer=0),
    "freeze": lambda: Freeze("blocks.1", until_epoch=1),
    "rate": lambda: LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, steps)),
}

#: Callbacks, and what differs otherwise: of a trainer, and of ``fit``.
CASES = {
    "many": (["ema", "noise", "penalty", "best", "stats"], {"model": "odd"}, {"batch_size": 9}),
    "others": (
        ["toggles", "swa by steps", "l1 of all", "freeze", "clip first", "rate", "ema aside"],
        {"micros": 2},
        {"batch_size": 7},
    ),
    "averages": (["ema", "rate"], {"model": "odd"}, {"batch_size": 5}),
    "averages beside": (["swa", "ema aside"], {}, {"batch_size": 5}),
    "by steps, frozen": (["freeze", "swa by steps", "ema"], {}, {"batch_size": 7}),
    "noise": (["noise", "stats"], {"model": "odd", "micros": 2}, {"batch_size": 5}),
    "penalty": (["penalty", "stats"], {"model": "odd", "micros": 3}, {"batch_size": 7}),
    "penalty of frozen": (["l1 of all", "freeze", "clip first"], {}, {"batch_size": 2}),
    "best": (["best", "ema"], {}, {"batch_size": 5, "lr": 0.1}),
    "best of its own": (["penalty", "best", "noise"], {}, {"batch_size": 5, "lr": 0.1}),
}


class Look(dtrain.Callback):
    """Keeps what an evaluation sees, and what was trained."""

    def __init__(self):
        self.seen, self.trained = [], []

    def on_eval_end(self, ctx, metrics):
        self.seen.append(some(ctx.model))

    def on_epoch_end(self, ctx):
        self.trained.append(some(ctx.model))


def some(model):
    """Returns a few of the parameters, whole: one with fewer rows than ranks, too."""
    return whole(torch.nn.ModuleList([model.blocks[1].a, model.get_submodule(model.last)]))


def train(strategy, case, options):
    dtrain.init(seed=0)
    names, given, fit = CASES[case]
    look, fit = Look(), dict(fit)
    model, optimizer = make(given.get("model", "net"))
    model.last = "out" if hasattr(model, "out") else "head"
    optimizer.param_groups[0]["lr"] = fit.pop("lr", 1e-2)
    trainer = sharding.trainer(
        strategy_of(strategy, **options),
        net=(model, optimizer),
        callbacks=[*(MAKE[name]() for name in names), look],
        micros=given.get("micros", 1),
    )
    result = trainer.fit(sharding.dataset(), **fit, epochs=2, eval_set=sharding.dataset(9))
    left = whole(model)
    outside = trainer.evaluate(sharding.dataset(9), batch_size=4)["eval/loss"]
    # A further fit goes on from its own weights, as if these had never stood aside.
    trainer.fit(sharding.dataset(), **fit, epochs=3, eval_set=sharding.dataset(9), name="main")
    weights = {
        **{f"left {name}": t for name, t in left.items()},
        **{f"on {name}": t for name, t in whole(model).items()},
        **{f"seen {i} {n}": t for i, one in enumerate(look.seen) for n, t in one.items()},
        **{f"epoch {i} {n}": t for i, one in enumerate(look.trained) for n, t in one.items()},
    }
    figures = {name: v for name, v in result.metrics.items() if "per_s" not in name}
    return weights, figures | {"outside": outside}


def train_all(strategy, cases, options):
    return {case: train(strategy, case, options) for case in cases}


QUICK = ["many", "others"]


@pytest.mark.parametrize(
    ("size", "options", "cases"),
    [
        (3, {"reshard": False}, QUICK),
        pytest.param(2, {}, QUICK, **SLOW),
        pytest.param(2, {"reshard": False}, [*CASES], **SLOW),
        pytest.param(3, {}, [*CASES], **SLOW),
        pytest.param(4, {"replicas": 2}, QUICK, **SLOW),
    ],
    ids=["3", "2", "2 all", "3 all", "replicas"],
)
def test_they_do_as_on_one_process(size, options, cases):
    ranks = run_processes(train_all, size, "fsdp", cases, options, timeout_s=200)
    (truth,) = run_processes(train_all, 1, "flat", cases, {}, timeout_s=100)
    for case, (weights, figures) in truth.items():
        for found, told in (one[case] for one in ranks):
            assert distance(found, weights) <= EXACT, case
            assert told == pytest.approx(figures, rel=1e-11), case
            assert all(torch.equal(t, ranks[0][case][0][n]) for n, t in found.items()), case


# ------------------------------------------------------------------- checkpoints


class Stops(dtrain.Callback):
    """Has the run saved and left at a step; and keeps what callbacks hold as a fit begins."""

    def __init__(self, at, held):
        self.at, self.held, self.begin = at, held, None

    def on_epoch_start(self, ctx):
        self.begin = self.begin or self.held(ctx.model)

    def on_step_start(self, ctx, step):
        if step.number == self.at:
            ctx.request.preempt("enough")


def go_on(run_dir, strategy, epochs, at):
    """Goes on with a run; returns what callbacks held as it began and as it ended, and the files.

    At the end, what can be loaded is what they held.
    """
    dtrain.init(seed=0)
    ema, swa = EMA(0.8), StochasticWeightAveraging(0, every_steps=2)
    best = EarlyStopping("eval/loss", patience=50, restore_best=True)

    def held(model):
        every = {"ema": ema.averages, "swa": swa.averages, "best": best._weights}
        return {f"{kind} {n}": full(t) for kind, one in every.items() for n, t in one.items()}

    stops = Stops(at, held)
    callbacks = [swa, best, ema, L1L2Penalty(l2=1e-2), GradientNoise(0.01)]
    trainer = sharding.trainer(
        strategy_of(strategy),
        model="odd",
        callbacks=[*callbacks, Checkpoint(every_epochs=1, keep=9), stops],
        run_dir=run_dir,
    )
    fit = {"batch_size": 6, "eval_set": sharding.dataset(9)}
    result = trainer.fit(sharding.dataset(), epochs=epochs, name="main", **fit)
    end, left = held(trainer.model), whole(trainer.model)
    which = {"averaged": "ema"} if result.preempted else {"averaged": "ema", "best": "best"}
    for role, kind in which.items():
        plain, _ = make("odd")
        dtrain.load_model(run_dir, plain, which=role)
        for name, p in plain.named_parameters():
            if f"{kind} {name}" in end:
                assert torch.equal(p.detach(), end[f"{kind} {name}"]), (role, name)
    exported = run_dir / f"{trainer.world.rank}-{epochs}.safetensors"
    dtrain.export_model(run_dir, exported)
    plain, _ = make("odd")
    dtrain.load_model(exported, plain)
    if not result.preempted:
        loaded = {name: p.detach() for name, p in plain.named_parameters()}
        assert all(torch.equal(t, loaded[n]) for n, t in left.items())
    names = {path.name for path in (run_dir / "checkpoints").glob("*/*")}
    return stops.begin, end, left, {name for name in names if not name.startswith("rank-")}


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


#: By how many ranks, with which strategy, up to which epoch; and where that was interrupted.
CHAIN = [(2, "fsdp", 1, -1), (3, "fsdp", 3, 6), (2, "ddp", 3, -1), (1, "fsdp", 4, -1)]
CHAIN += [(2, "fsdp", 5, -1), (3, "fsdp", 5, -1)]  # the last finds the run over


@pytest.mark.parametrize("chain", [CHAIN[:3], pytest.param(CHAIN, **SLOW)], ids=["some", "all"])
def test_averages_and_best_weights_go_on_with_other_strategies_and_ranks(tmp_path, chain):
    last = before = None
    for size, strategy, epochs, at in chain:
        ranks = run_processes(go_on, size, tmp_path / "run", strategy, epochs, at, timeout_s=60)
        begin, end, left, files = ranks[0]
        if begin is None:  # nothing was left to train
            assert all(torch.equal(t, before[n]) for n, t in left.items())
            continue
        if last is not None:
            assert begin.keys() == last.keys()
            assert all(torch.equal(t, last[n]) for n, t in begin.items()), (size, strategy)
        last, before = end, left
    args = tmp_path / "straight", "flat", max(epochs for _, _, epochs, _ in chain), -1
    _, end, left, expected = run_processes(go_on, 1, *args)[0]
    assert distance(last, end) <= EXACT
    assert distance(before, left) <= EXACT
    assert files == expected


# ------------------------------------------------------------------- penalties by hand, and hooks


class Hooks(dtrain.Callback):
    """Does on one rank, or on all, what a hook may do in the second step; or what it may not."""

    def __init__(self, what):
        self.what = what

    def on_step_start(self, ctx, step):
        if step.number == 1 and self.what == "raises" and dtrain.init(seed=0).rank == 1:
            raise ValueError("planted")
        if step.number == 1 and self.what == "changes":
            with torch.no_grad():
                ctx.model.head.weight.mul_(2.0)
        if step.number == 1 and self.what == "freezes":
            ctx.model.blocks[0].a.weight.requires_grad_(False)

    def on_grads_ready(self, ctx, step):
        if self.what == "mixes":
            for p in ctx.model.parameters():
                p.grad += torch.ones(p.shape, dtype=p.dtype)


def by_hand(kind):
    """Returns a penalty on a block's weights, computed from their rows."""

    def loss(model, batch):
        found = sharding.loss_fn(model, batch)
        weight = model.blocks[1].a.weight
        rows = weight.to_local() if kind == "rows" else weight.full_tensor()
        found.mean = found.mean + rows.square().sum()
        return found

    return loss


def refused():
    """Returns what each habit came to, and whether the fit can be called again."""
    dtrain.init(seed=0)
    told = {}
    for what in ("rows", "whole", "mixes", "raises", "changes", "freezes"):
        loss = by_hand(what) if what in ("rows", "whole") else sharding.loss_fn
        trainer = sharding.trainer(
            strategy_of("fsdp"), loss=loss, callbacks=[L1L2Penalty(l2=0.1), Hooks(what)]
        )
        try:
            trainer.fit(sharding.dataset(), batch_size=6, epochs=1)
            told[what] = "nothing"
        except Exception as error:  # noqa: BLE001 -- looked at by the test
            told[what] = "\n".join(
                [type(error).__name__, str(error), *getattr(error, "__notes__", ())]
            )
        told[what] += f"\nat step {trainer.context.progress.step}"
    return told


def test_what_cannot_be_right_is_an_error_on_all_ranks():
    words = {
        "rows": "computed with rows of blocks.1.a.weight, outside of the model's forward",
        "whole": "computed with rows of blocks.1.a.weight, outside of the model's forward",
        "mixes": "a hook computes with `p.to_local()`",
        "raises": "planted",
        "changes": "changed, frozen or thawed in on_step_start after L1L2Penalty",
        "freezes": "changed, frozen or thawed in on_step_start after L1L2Penalty",
    }
    for rank, told in enumerate(run_processes(refused, 2)):
        for what, expected in words.items():
            assert expected in told[what], (rank, told[what])
        assert told["rows"].endswith("at step 0")
        assert told["raises"].startswith("ValueError" if rank == 1 else "RemoteError")
        assert told["raises"].endswith("at step 1")
