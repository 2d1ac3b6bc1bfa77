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


class AsModule(torch.nn.Module):
    """A loss function that is a module, of three arguments or of any."""

    def __init__(self, takes_any):
        super().__init__()
        if takes_any:
            self.forward = lambda model, *rest: loss_fn(model, rest[0])

    def forward(self, model, batch, ctx):
        return loss_fn(model, batch)


def train_by_modules(strategy):
    """Returns the parameters after training by a function, and by modules."""
    dtrain.init(seed=1)
    found = []
    for loss in (loss_fn, AsModule(False), AsModule(True)):
        trainer = tiny.trainer(loss=loss, eval_fn=loss, strategy=strategy)
        trainer.fit(tiny.dataset(), batch_size=12, epochs=2, eval_set=tiny.dataset(samples=20))
        found.append(_lists(trainer.model))
    return found


@pytest.mark.parametrize("strategy", ["flat", "ddp"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_function_may_be_a_module(world_size, strategy):
    for by_function, *by_modules in run_processes(train_by_modules, world_size, strategy):
        assert by_modules == [by_function] * 2
