"""dtrain's losses equal those of examples/plain_ddp.py, written by hand, bit for bit."""

import importlib.util
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import ClipGradients, GradientAccumulation, LRSchedule
from dtrain.data import Shuffled
from dtrain.testing import run_processes

PLAIN = Path(__file__).parents[2] / "examples" / "plain_ddp.py"
# Sums of powers of two are exact in any order, so shares must be: 64 = 2 ranks x 2 x 16.
EPOCHS, BATCH_SIZE, SAMPLES, LR, MAX_NORM = 3, 64, 1024, 5e-3, 0.5


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def train_twins(micro_steps):
    """Returns the step losses and the final parameters of dtrain, then of the plain loop."""
    spec = importlib.util.spec_from_file_location("plain_ddp", PLAIN)
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    with dtrain.init(seed=1):
        model, twin = plain.make_model(), plain.make_model()
        twin.load_state_dict(model.state_dict())
        train_set = TensorDataset(*(tensor[:SAMPLES] for tensor in plain.load_data()[0].tensors))
        order = Shuffled(SAMPLES, seed=7)

        record = tiny.Record()
        callbacks = [
            ClipGradients(max_norm=MAX_NORM),
            LRSchedule(lambda opt, steps: OneCycleLR(opt, LR, total_steps=steps)),
            record,
        ]
        if micro_steps > 1:
            callbacks.append(GradientAccumulation(steps=micro_steps))
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
        trainer = dtrain.Trainer(
            model, optimizer, loss_fn, callbacks=callbacks, sinks=[], strategy="ddp"
        )
        trainer.fit(dtrain.Data(train_set, BATCH_SIZE, order=order), epochs=EPOCHS)

        losses = plain.train(
            twin,
            train_set,
            lambda epoch: order.indices(epoch, 0, SAMPLES),
            epochs=EPOCHS,
            batch_size=BATCH_SIZE,
            micro_steps=micro_steps,
            lr=LR,
            max_norm=MAX_NORM,
        )
    return (record.losses, _lists(model)), (losses, _lists(twin))


def _lists(model):
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_equal_bit_for_bit(world_size, micro_steps):
    for ours, plain in run_processes(train_twins, world_size, micro_steps):
        losses, parameters = ours
        plain_losses, plain_parameters = plain
        assert len(losses) == EPOCHS * SAMPLES // BATCH_SIZE
        assert losses[-1] < losses[0] / 2
        assert losses == plain_losses
        assert parameters == plain_parameters
