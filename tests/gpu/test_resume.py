"""Law 4 on a card: a run that was broken off ends with the bits of one that was not."""

import pytest
import torch
import training
from torch import nn

import dtrain
from dtrain.callbacks import EMA, Checkpoint, ClipGradients, LRSchedule, MixedPrecision

STEPS, BREAKS_AT, SAVES_EVERY = 20, 15, 6


class Breaks(dtrain.Callback):
    """Ends the training in the middle of a step."""

    def on_batch(self, ctx, step):
        if step.number == BREAKS_AT:
            raise InterruptedError("planted")


def model():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.GELU(), nn.Dropout(0.3), nn.Linear(128, 10)
    )


def fit(precision, folder, *more):
    """Trains; returns all that a run ends with: weights, buffers, averages, moments, losses."""
    dtrain.init(seed=0)
    watch = training.Watch()
    # The scale grows within the run.
    scale = {"growth_interval": 4, "init_scale": 1024.0} if precision == "fp16" else {}
    trainer = dtrain.Trainer(
        model(),
        training.adamw,
        training.loss_fn,
        callbacks=[
            *([MixedPrecision(precision, **scale)] if precision else []),
            EMA(0.9),
            ClipGradients(training.CLIP),
            LRSchedule(lambda opt, n: torch.optim.lr_scheduler.CosineAnnealingLR(opt, n)),
            Checkpoint(every_steps=SAVES_EVERY),
            watch,
            *more,
        ],
        sinks=[],
        run_dir=folder,
    )
    trainer.fit(
        training.dataset(7 * training.BATCH - 5), batch_size=training.BATCH, max_steps=STEPS
    )
    state = {**trainer.model.state_dict(), "losses": torch.tensor(watch.figures.losses)}
    state["scale"] = torch.tensor([*trainer.precision.values().values()])
    for number, values in trainer.optimizer.state_dict()["state"].items():
        state |= {f"{number}.{name}": value for name, value in values.items()}
    averages = model()
    dtrain.load_model(folder, averages)
    state |= {f"averaged {name}": t for name, t in averages.state_dict().items()}
    return {name: tensor.cpu().clone() for name, tensor in state.items()}


@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
def test_a_run_that_was_broken_off_ends_with_the_same_bits(device, tmp_path, precision):
    whole = fit(precision, tmp_path / "whole")
    again = fit(precision, tmp_path / "again")
    assert all(torch.equal(whole[name], again[name]) for name in whole), "it repeats no bits here"
    with pytest.raises(InterruptedError, match="planted"):
        fit(precision, tmp_path / "broken", Breaks())
    resumed = fit(precision, tmp_path / "broken")
    # From the checkpoint after step 12, not from where it broke off.
    kept = STEPS - BREAKS_AT // SAVES_EVERY * SAVES_EVERY
    assert len(resumed["losses"]) == kept
    whole["losses"] = whole["losses"][-kept:]
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    assert any(name.startswith("averaged") for name in whole)
