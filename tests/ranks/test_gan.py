"""examples/gan.py gives what the loop that it spares gives, which is written out here."""

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import Subset

import dtrain
from dtrain.callbacks import ClipGradients, GradientAccumulation
from dtrain.data import Shuffled
from dtrain.testing import run_processes

GAN = Path(__file__).parents[2] / "examples" / "gan.py"
STEPS, BATCH_SIZE, SAMPLES = 12, 22, 50  # neither divides the other


@cache
def loaded():
    spec = importlib.util.spec_from_file_location("gan", GAN)
    gan = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gan)
    return gan, Subset(gan.Digits(torch.float64), range(SAMPLES))


def example():
    gan, data = loaded()
    torch.manual_seed(5)
    networks = gan.make_networks().double()
    return gan, networks, gan.make_optimizers(networks), data


@cache
def by_hand():
    """Plain torch: one process, the whole batch at once."""
    _, networks, optimizers, data = example()
    critic, generator = networks["critic"], networks["generator"]
    order = Shuffled(SAMPLES, seed=7)
    losses = []
    epoch = place = 0
    for step in range(STEPS):
        data.dataset.set_epoch(epoch)
        rows = order.indices(epoch, place, min(place + BATCH_SIZE, SAMPLES))
        images, noise = map(torch.stack, zip(*(data[int(row)] for row in rows), strict=True))
        fake = generator(noise)
        loss = F.softplus(-critic(images)).mean() + F.softplus(critic(fake.detach())).mean()
        optimizers["critic"].zero_grad()
        loss.backward()
        optimizers["critic"].step()
        losses.append(loss.item())
        if step % 2:
            critic.requires_grad_(False)
            loss = F.softplus(-critic(fake)).mean()
            optimizers["generator"].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
            optimizers["generator"].step()
            critic.requires_grad_(True)
            losses.append(loss.item())
        place += BATCH_SIZE
        if place >= SAMPLES:
            epoch, place = epoch + 1, 0
    return {n: p.detach() for n, p in networks.named_parameters()}, losses


class Losses(dtrain.Callback):
    def __init__(self):
        self.values = []

    def on_grads_ready(self, ctx, step):
        self.values.append(step.loss_mean)


def train(strategy, micros):
    dtrain.init(seed=0)
    gan, networks, optimizers, data = example()
    losses = Losses()
    trainer = dtrain.Trainer(
        networks,
        optimizers,
        gan.loss_fn,
        updates=gan.updates,
        callbacks=[GradientAccumulation(micros), losses, ClipGradients(1.0, optimizer="generator")],
        sinks=[],
        strategy=strategy,
    )
    order = Shuffled(SAMPLES, seed=7)
    trainer.fit(dtrain.Data(data, BATCH_SIZE, order=order), max_steps=STEPS)
    return {n: p.detach().clone() for n, p in networks.named_parameters()}, losses.values


def train_some(cases):
    return [train(*case) for case in cases]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_example_is_the_loop_by_hand(world_size):
    expected, expected_losses = by_hand()
    cases = [("flat", 1), ("ddp", 2), ("flat", 3)]
    for found in run_processes(train_some, world_size, cases, timeout_s=100):
        for case, (params, losses) in zip(cases, found, strict=True):
            assert losses == pytest.approx(expected_losses, rel=1e-12)
            for name, value in params.items():
                distance = (value - expected[name]).norm() / expected[name].norm()
                assert distance <= 1e-12, f"{case}: {name} is {distance:.1e} away"
