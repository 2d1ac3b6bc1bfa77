"""Each of dtrain's callbacks by itself: a sharded training has the numbers of one that is not."""

import inspect

import pytest
import sharding
import torch
from sharding import WIDTH, distance, strategy_of, whole
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR

import dtrain
from dtrain import callbacks
from dtrain.testing import run_processes

FREEZES = {"blocks.1": 1, "head.bias": 1}

MAKE = {
    "Checkpoint": lambda: callbacks.Checkpoint(every_steps=2, best="eval/loss"),
    "CheckpointActivations": lambda: callbacks.CheckpointActivations(),
    "ClipGradients": lambda: callbacks.ClipGradients(max_value=0.01),
    "EMA": lambda: callbacks.EMA(0.9),
    "EarlyStopping": lambda: callbacks.EarlyStopping("eval/loss", restore_best=True),
    "EvalOutputs": lambda: callbacks.EvalOutputs({"sum": lambda outputs: outputs.double().sum()}),
    "Freeze": lambda: callbacks.Freeze(FREEZES, eval_mode=True),
    "GradientAccumulation": lambda: callbacks.GradientAccumulation(micro_batch_size=2),
    "GradientNoise": lambda: callbacks.GradientNoise(0.01),
    "GradientStats": lambda: callbacks.GradientStats(every=1, per="module"),
    "L1L2Penalty": lambda: callbacks.L1L2Penalty(l1=1e-3, l2=1e-2),
    "LRSchedule": lambda: callbacks.LRSchedule(lambda opt, steps: ExponentialLR(opt, 0.8)),
    "LabelSmoothing": lambda: callbacks.LabelSmoothing(0.1, 3),
    "LogSamples": lambda: callbacks.LogSamples(lambda outputs, batch: {"y": str(len(outputs))}),
    "LossSpikeGuard": lambda: callbacks.LossSpikeGuard(window=4),
    "MixedPrecision": lambda: callbacks.MixedPrecision("bf16"),
    "Mixup": lambda: callbacks.Mixup(0.4, 3),
    "NonFiniteGuard": lambda: callbacks.NonFiniteGuard("skip"),
    "OverfitBatches": lambda: callbacks.OverfitBatches(2),
    "ParamSchedule": lambda: callbacks.ParamSchedule("weight_decay", lambda p: 1 / (1 + p.step)),
    "Profile": lambda: callbacks.Profile((1, 2)),
    "StochasticWeightAveraging": lambda: callbacks.StochasticWeightAveraging(0),
    "Throughput": lambda: callbacks.Throughput(),
    "TimeLimit": lambda: callbacks.TimeLimit("1h"),
}
CLOSE = {"MixedPrecision": 1e-3}  # bfloat16 rounds; of what is gathered, it rounds otherwise


def data():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(14, WIDTH, generator=generator, dtype=torch.float64)
    return torch.utils.data.TensorDataset(x, x[:, :3].argmax(-1))


def loss_fn(model, batch):
    x, y = batch
    logits = model(x)
    return dtrain.Loss(F.cross_entropy(logits, y), outputs=logits.argmax(-1))


def train(strategy, name, run_dir):
    dtrain.init(seed=0)
    torch.manual_seed(1)
    model = sharding.Net(out=3).double()
    trainer = dtrain.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        loss_fn,
        callbacks=[MAKE[name]()],
        sinks=[],
        strategy=strategy_of(strategy),
        run_dir=run_dir / f"{strategy} {name}" if name in ("Checkpoint", "Profile") else None,
    )
    result = trainer.fit(data(), batch_size=6, epochs=2, eval_set=data(), log_every=1)
    timed = ("throughput/", "samples_per_s", "seconds")
    figures = {n: v for n, v in result.metrics.items() if not any(t in n for t in timed)}
    return whole(model), figures, trainer.context.progress.updates, result.stop_reason


def train_all(strategy, run_dir):
    return {name: train(strategy, name, run_dir) for name in MAKE}


def test_each_callback_is_compared():
    every = [one for _, one in inspect.getmembers(callbacks, inspect.isclass)]
    assert MAKE.keys() == {c.__name__ for c in every if issubclass(c, dtrain.Callback)}
    assert not any(make().whole_weights for make in MAKE.values())


@pytest.mark.slow
def test_each_callback_does_the_same_where_the_model_is_sharded(tmp_path):
    truth = run_processes(train_all, 2, "flat", tmp_path, timeout_s=100)[0]
    for found in run_processes(train_all, 2, "fsdp", tmp_path, timeout_s=100):
        for name, (weights, figures, *rest) in truth.items():
            close = CLOSE.get(name, 1e-12)
            assert distance(found[name][0], weights) <= close, name
            assert found[name][1] == pytest.approx(figures, rel=10 * close), name
            assert [*found[name][2:]] == rest, name
