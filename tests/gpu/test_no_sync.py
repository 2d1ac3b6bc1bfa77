"""In a step the host does not wait for the GPU, with all usual callbacks; 100 steps are watched.

Between steps it may: to report, evaluate and save. What CUDA's sync debug mode flags are copies to
the host, and whatever reads a number or a size from the device. It does not flag waiting for an
event: that is how dtrain looks at the step before.
"""

import warnings
from contextlib import contextmanager

import pytest
import torch
import training
from stand_in import NoReads
from torch.optim.lr_scheduler import CosineAnnealingLR

import dtrain
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    ClipGradients,
    EarlyStopping,
    GradientAccumulation,
    GradientStats,
    LossSpikeGuard,
    LRSchedule,
    MixedPrecision,
    NonFiniteGuard,
    ParamSchedule,
    StochasticWeightAveraging,
    Throughput,
    TimeLimit,
)
from dtrain.loop import Loop
from dtrain.sinks import JSONLines

# The first epoch is not watched: there all is compiled, and memory is got. Last batches are ragged.
STEPS_PER_EPOCH, EPOCHS = 26, 5
_FLAG = "called a synchronizing CUDA operation"
WATCHED = STEPS_PER_EPOCH * (EPOCHS - 1)


@contextmanager
def no_sync(device, counted=None):
    """Raises at each sync, or counts them."""
    if device.type == "cpu":
        with NoReads(counted):
            yield
        return
    torch.cuda.set_sync_debug_mode("error" if counted is None else "warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if counted is not None:
        counted += [str(one.message) for one in caught if _FLAG in str(one.message)]


def fit(device, monkeypatch, run_dir, callbacks, *, strategy="flat", **options):
    """Trains; returns how many steps were watched."""
    compiled, counted, loss = (options.get(name) for name in ("compiled", "counted", "loss"))
    watched, take_step = [], Loop._step

    def step(loop, feed):
        if loop.context.progress.step < STEPS_PER_EPOCH:
            return take_step(loop, feed)
        assert loop.runs_ahead
        with no_sync(device, counted):
            done = take_step(loop, feed)
        watched.append(done)
        return done

    monkeypatch.setattr(Loop, "_step", step)
    dtrain.init(seed=0)
    net = training.model()
    backend = "inductor" if device.type == "cuda" else "eager"
    trainer = dtrain.Trainer(
        torch.compile(net, backend=backend) if compiled else net,
        training.adamw,
        loss or training.loss_fn,
        callbacks=callbacks,
        sinks=[JSONLines()],
        run_dir=run_dir,
        strategy=strategy,
    )
    data = training.dataset(STEPS_PER_EPOCH * training.BATCH - 5)
    result = trainer.fit(
        data, batch_size=training.BATCH, epochs=EPOCHS, eval_set=data, eval_every=40, log_every=20
    )
    assert result.steps == STEPS_PER_EPOCH * EPOCHS
    return len(watched)


def usual(*more):
    return [
        *more,
        LRSchedule(lambda opt, steps: CosineAnnealingLR(opt, steps)),
        ParamSchedule("weight_decay", lambda progress: 0.1 / (1 + progress.epoch)),
        ClipGradients(1.0),
        GradientStats(every=20),
        Throughput(),
        EarlyStopping("eval/loss", patience=1000),
        Checkpoint(every_steps=30, keep=2),
        TimeLimit("1h"),
    ]


CASES = {
    "float32": lambda: usual(),
    "bf16": lambda: usual(MixedPrecision("bf16")),
    "fp16": lambda: usual(MixedPrecision("fp16", growth_interval=10)),
    "accumulated": lambda: usual(MixedPrecision("bf16"), GradientAccumulation(4)),
    # They act on the device, or a step late.
    "guards": lambda: usual(
        MixedPrecision("bf16"),
        EMA(0.99),
        StochasticWeightAveraging(1, every_steps=2),
        LossSpikeGuard(window=8),
        NonFiniteGuard(),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(device, monkeypatch, tmp_path, case):
    assert fit(device, monkeypatch, tmp_path, CASES[case]()) == WATCHED >= 100


def test_nor_with_ddp(device, monkeypatch, tmp_path):
    assert fit(device, monkeypatch, tmp_path, CASES["bf16"](), strategy="ddp") == WATCHED


def test_nor_does_one_of_a_compiled_model(device, monkeypatch, tmp_path):
    callbacks = CASES["bf16"]()
    if device.type == "cpu":  # what stands in for the debug mode cannot look into what is compiled
        monkeypatch.setattr("stand_in._READS", ())
    assert fit(device, monkeypatch, tmp_path, callbacks, compiled=True) == WATCHED


def test_the_check_can_fail(device, monkeypatch, tmp_path):
    def loss(net, batch):
        found = training.loss_fn(net, batch)
        found.mean.item()
        return found

    with pytest.raises(RuntimeError, match=r"synchronizing|would wait for a GPU"):
        fit(device, monkeypatch, tmp_path, CASES["bf16"](), loss=loss)
