"""Several optimizers that one loss steps together, where the model is sharded."""

import pytest
import sharding
import torch
from sharding import distance, strategy_of, whole
from torch.optim.lr_scheduler import ExponentialLR

import dtrain
from dtrain.callbacks import Checkpoint, ClipGradients, GradientStats, LRSchedule
from dtrain.errors import ConfigError, RemoteError
from dtrain.testing import run_processes


def optimizers(model):
    blocks, others = [*model.blocks.parameters()], [*model.head.parameters()]
    return [
        torch.optim.SGD(blocks, lr=0.1, momentum=0.9),
        torch.optim.AdamW([{"params": model.first.parameters()}, {"params": others, "lr": 2e-2}]),
    ]


def train(run_dir, strategy, epochs):
    """Goes on with a run; returns the weights, moments by name, and figures."""
    dtrain.init(seed=0)
    model, _ = sharding.make()
    trainer = sharding.trainer(
        strategy_of(strategy),
        net=(model, optimizers(model) if epochs == 1 else optimizers),
        callbacks=[
            GradientStats(every=1, optimizer=1),
            ClipGradients(0.3, optimizer=1),
            LRSchedule(lambda opt, steps: ExponentialLR(opt, 0.9), optimizer=0),
            Checkpoint(every_epochs=1),
        ],
        micros=2,
        run_dir=run_dir,
    )
    result = trainer.fit(sharding.dataset(), batch_size=6, epochs=epochs)
    named = {id(p): name for name, p in model.named_parameters()}
    moments = {
        f"{named[id(p)]}/{key}": t.full_tensor() if hasattr(t, "full_tensor") else t.clone()
        for part in trainer.context.optimizers.values()
        for p, held in part.state.items()
        for key, t in held.items()
        if isinstance(t, torch.Tensor)
    }
    figures = {name: v for name, v in result.metrics.items() if "per_s" not in name}
    return whole(model), moments, figures


def test_they_train_as_on_one_process_and_go_on_with_other_ranks(tmp_path):
    run = tmp_path / "run"
    chain = [(2, "fsdp"), (3, "fsdp"), (2, "flat")]
    (truth,) = run_processes(train, 1, tmp_path / "straight", "flat", len(chain))
    for epochs, (size, strategy) in enumerate(chain, 1):
        ranks = run_processes(train, size, run, strategy, epochs)
    for weights, moments, figures in ranks:
        assert distance(weights, truth[0]) <= 1e-12
        assert distance(moments, truth[1]) <= 1e-12
        assert figures == pytest.approx(truth[2], rel=1e-11)


def refused(kind):
    dtrain.init(seed=0)
    model, _ = sharding.make()
    made = optimizers(model)
    given = {
        "named": dict(zip("ab", made, strict=True)),
        "whole": [made[0], torch.optim.Adafactor([*model.first.parameters()])],
    }[kind]
    with pytest.raises((ConfigError, RemoteError)) as told:
        sharding.trainer(strategy_of("fsdp"), net=(model, given))
    return str(told.value)


def test_what_cannot_be_sharded_of_several_is_refused_in_words():
    for told in run_processes(refused, 2, "named"):
        assert "pass a list of optimizers, which are stepped together by one loss" in told
    for told in run_processes(refused, 2, "whole"):
        assert "Adafactor looks at whole parameters" in told
