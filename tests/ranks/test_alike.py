"""Ranks that are threads do what real ranks do: results, errors, words, and every callback."""

import functools
import re

import pytest
import test_comm as scenes
import torch
from torch.optim.lr_scheduler import StepLR

import dtrain
import dtrain.callbacks
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    CheckpointActivations,
    ClipGradients,
    EarlyStopping,
    EvalOutputs,
    Freeze,
    GradientAccumulation,
    GradientNoise,
    GradientStats,
    L1L2Penalty,
    LabelSmoothing,
    LogSamples,
    LossSpikeGuard,
    LRSchedule,
    MixedPrecision,
    Mixup,
    NonFiniteGuard,
    OverfitBatches,
    ParamSchedule,
    Profile,
    StochasticWeightAveraging,
    Throughput,
    TimeLimit,
)
from dtrain.testing import Fault, Raise, run_outcomes, run_processes, run_ranks, tiny_fit, try_ranks

TIMEOUT_S = 60

# ----------------------------------------------------------------------------- verbs


def mains(comm, rank, size, lines):
    calls = []
    told = comm.on_main("m", lambda: calls.append(rank) or {"from": rank})
    return told, calls, comm.on_main("none", lambda: None)


def main_returns_what_cannot_be_sent(comm, rank, size, lines):
    with comm.lockstep("the phase"):
        comm.on_main("open", lambda: lambda: 1)


def dtypes(comm, rank, size, lines):
    return {str(key): str(value) for key, value in scenes.dtypes(comm, rank, size, lines).items()}


SCENES = (
    scenes.reductions,
    scenes.kinds,
    scenes.gathers,
    scenes.broadcasts,
    scenes.votes,
    mains,
    scenes.refusals,
    dtypes,
    *scenes.MISMATCHES,
    scenes.other_rule,
    scenes.first_fails,
    scenes.last_fails,
    scenes.two_fail,
    scenes.nested,
    scenes.caught_and_again,
    scenes.converted,
    scenes.converted_by_all,
    scenes.main_fails,
    scenes.main_fails_in_lockstep,
    main_returns_what_cannot_be_sent,
    scenes.gathers_what_cannot_be_sent,
    scenes.no_failures,
    scenes.one_failure,
)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_verbs_return_and_raise_the_same(size):
    chosen = [s for s in SCENES if size > 1 or s in SCENES[:8]]
    real = run_processes(scenes.play, size, *chosen, timeout_s=TIMEOUT_S)
    fake = run_ranks(scenes.play, size, *chosen)
    for rank in range(size):
        for scene in real[rank]:
            assert fake[rank][scene] == real[rank][scene], (rank, scene)
    assert fake == real


def leaves_early():
    world = dtrain.init()
    if world.rank == 1:
        return "fine"
    return world.comm.vote("all there", True)


def raises_alone():
    world = dtrain.init()
    if world.rank == 1:
        world.comm.leave(error := ValueError("planted"), "backward")
        raise error
    world.comm.vote("all there", True)


def raises_and_tells_nobody():
    if dtrain.init().rank == 1:
        raise ValueError("planted")
    dtrain.init().comm.vote("all there", True)


@pytest.mark.parametrize("fn", [leaves_early, raises_alone, raises_and_tells_nobody])
def test_ranks_that_leave_are_missed_in_the_same_words(fn):
    # What the transport itself says comes last: gloo's words, or those of the threads.
    told = [
        [(type(o.error), re.sub(r"out of time\): .*", "", str(o.error)), o.value) for o in outcomes]
        for outcomes in (run_outcomes(fn, 3, timeout_s=TIMEOUT_S), try_ranks(fn, 3))
    ]
    assert told[0] == told[1]


# ----------------------------------------------------------------------------- failures of a fit


def fails_in(hook, run_dir):
    fault = Fault(
        Raise(ValueError("planted")), rank=1, step=4 if hook == "on_save" else 2, hook=hook
    )
    tiny_fit([fault, Checkpoint()], run_dir=run_dir)


@pytest.mark.parametrize("hook", ["on_loss", "on_grads_ready", "on_eval_batch", "on_save"])
def test_a_failure_is_told_in_the_same_words(hook, tmp_path):
    told = [
        [(type(o.error), str(o.error)) for o in outcomes]
        for outcomes in (
            run_outcomes(fails_in, 2, hook, tmp_path / "a", timeout_s=TIMEOUT_S),
            try_ranks(fails_in, 2, hook, tmp_path / "b"),
        )
    ]
    assert told[0] == told[1]
    assert told[0][1] == (ValueError, "planted")


# ----------------------------------------------------------------------------- callbacks


def first_logits(outputs, batch):
    return {"logits": str(outputs[0].tolist())}


# By name: how to make it, on each rank anew.
CALLBACKS = {
    "EMA": functools.partial(EMA, 0.9, use_at_end=True),
    "Checkpoint": functools.partial(Checkpoint, every_steps=3),
    "CheckpointActivations": functools.partial(CheckpointActivations, [torch.nn.Linear]),
    "ClipGradients": functools.partial(ClipGradients, 0.1),
    "EarlyStopping": functools.partial(
        EarlyStopping, "eval/loss", mode="max", patience=1, restore_best=True
    ),
    "EvalOutputs": functools.partial(EvalOutputs, {"spread": lambda logits: float(logits.std())}),
    "Freeze": functools.partial(Freeze, "0", until_epoch=1),
    "GradientAccumulation": functools.partial(GradientAccumulation, steps=2),
    "GradientNoise": functools.partial(GradientNoise, 0.1),
    "GradientStats": functools.partial(GradientStats, 2),
    "L1L2Penalty": functools.partial(L1L2Penalty, l1=0.01, l2=0.01),
    "LRSchedule": functools.partial(LRSchedule, lambda opt, steps: StepLR(opt, 2, gamma=0.5)),
    "LabelSmoothing": functools.partial(LabelSmoothing, 0.1, 2),
    "LogSamples": functools.partial(LogSamples, first_logits),
    "LossSpikeGuard": functools.partial(LossSpikeGuard, 1e-3, window=2),
    "MixedPrecision": functools.partial(MixedPrecision, "bf16"),
    "Mixup": functools.partial(Mixup, 0.4, 2),
    "NonFiniteGuard": functools.partial(NonFiniteGuard, "skip"),
    "OverfitBatches": functools.partial(OverfitBatches, 1),
    "ParamSchedule": functools.partial(ParamSchedule, "lr", lambda p: 0.01 / (1 + p.step)),
    "Profile": functools.partial(Profile, (1, 3)),
    "StochasticWeightAveraging": functools.partial(StochasticWeightAveraging, 1),
    "Throughput": Throughput,
    "TimeLimit": functools.partial(TimeLimit, "1h"),
}
TIMED = ("throughput/", "time/", "memory")


class Drops(torch.nn.Sequential):
    """With dropout: a rank's masks are those of a process of its own."""

    def __init__(self):
        super().__init__(
            torch.nn.Linear(8, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(16, 2),
        )


def in_batch_negatives(net, batch, ctx):
    x, _ = batch
    left, right = net(x), net(x.flip(1))
    rights = ctx.comm.gather_with_grad("right", right)
    return (left @ rights.T).logsumexp(-1).mean()


def fit_each(folder, names):
    """Trains with each callback; returns, by name, all that must be equal."""
    told = {}
    for name in names:
        make = CALLBACKS.get(name)
        options = {
            "model": Drops if name == "dropout" else None,
            "loss_fn": in_batch_negatives if name == "gathers" else None,
        }
        callbacks = [] if make is None else [make()]
        fit = tiny_fit(
            callbacks, epochs=3, samples=44, log_every=2, run_dir=folder / name, **options
        )
        figures = {k: v for k, v in fit.result.metrics.items() if not k.startswith(TIMED)}
        words = (fit.result.steps, fit.result.epochs, fit.result.stop_reason)
        weights = {key: tensor.tolist() for key, tensor in fit.weights.items()}
        told[name] = (fit.losses, fit.applied, words, figures, weights)
    return told


ALONE = ("none", "dropout", "gathers")  # no callback, but another model or loss function


def test_every_callback_is_tried():
    assert set(CALLBACKS) == set(dtrain.callbacks.__all__) - {"hard_labels"}


@pytest.mark.parametrize("size", [1, 2])
def test_every_callback_trains_to_the_same_bits(size, tmp_path):
    names = [*ALONE, *CALLBACKS]
    real = run_processes(fit_each, size, tmp_path / "real", names, timeout_s=TIMEOUT_S)
    fake = run_ranks(fit_each, size, tmp_path / "fake", names, timeout_s=TIMEOUT_S)
    for rank in range(size):
        for name in real[rank]:
            for mine, theirs in zip(fake[rank][name], real[rank][name], strict=True):
                assert mine == theirs, (rank, name)


def test_three_ranks_train_to_the_same_losses(tmp_path):
    names = [*ALONE, "GradientAccumulation", "EMA"]
    real = run_processes(fit_each, 3, tmp_path / "real", names, timeout_s=TIMEOUT_S)
    fake = run_ranks(fit_each, 3, tmp_path / "fake", names, timeout_s=TIMEOUT_S)
    for rank in range(3):
        for name in names:
            # Gloo adds three ranks up in another order.
            assert fake[rank][name][0] == pytest.approx(real[rank][name][0], rel=1e-5), name
            assert fake[rank][name][1:3] == real[rank][name][1:3], name
