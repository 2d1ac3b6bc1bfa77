"""Trains a small GAN on scikit-learn's digits: two networks, two optimizers, two updates a step.

    python examples/gan.py                           # one process
    bash launch/torchrun.sh examples/gan.py          # a rank per GPU, or two on the CPU

The loss function yields each update's loss; after the first, the critic is the new one, and the
fakes are the same. tests/ranks/test_gan.py has the loop that this spares, written by hand.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import dtrain
from dtrain.callbacks import Checkpoint, ClipGradients
from dtrain.sinks import Console, JSONLines

NOISE = 16


class Digits(Dataset):
    """Images, and for each the noise that a fake is to be made of.

    It is drawn for a sample and an epoch, so it is the same whichever rank has the sample.
    """

    def __init__(self, dtype=torch.float32):
        images = torch.tensor(load_digits().images, dtype=dtype)
        self.images = images.unsqueeze(1) / 8 - 1  # [1797, 1, 8, 8], from -1 to 1
        self.epoch = 0

    def set_epoch(self, epoch):  # dtrain calls it
        self.epoch = epoch

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        generator = torch.Generator().manual_seed(self.epoch * len(self) + row)
        noise = torch.randn(NOISE, generator=generator, dtype=self.images.dtype)
        return self.images[row], noise


def make_networks():
    # GroupNorm: BatchNorm's statistics would be each rank's own.
    generator = nn.Sequential(
        nn.Linear(NOISE, 64 * 2 * 2),
        nn.Unflatten(1, (64, 2, 2)),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),  # [n, 32, 4, 4]
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),  # [n, 1, 8, 8]
        nn.Tanh(),
    )
    critic = nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, 1),
    )
    return nn.ModuleDict({"generator": generator, "critic": critic})


def make_optimizers(networks):
    return {
        "critic": torch.optim.Adam(networks["critic"].parameters(), lr=1e-3, betas=(0.5, 0.99)),
        "generator": torch.optim.Adam(
            networks["generator"].parameters(), lr=1e-3, betas=(0.5, 0.99)
        ),
    }


def updates(progress):
    """The critic learns in each step, the generator in every second."""
    return ("critic", "generator") if progress.step % 2 else ("critic",)


def loss_fn(networks, batch, ctx):
    images, noise = batch
    critic, fake = networks["critic"], networks["generator"](noise)
    real, made = critic(images), critic(fake.detach())
    told = torch.cat([real > 0, made < 0]).to(images.dtype).mean()
    yield (
        "critic",
        dtrain.Loss(F.softplus(-real).mean() + F.softplus(made).mean(), metrics={"accuracy": told}),
    )
    if "generator" in updates(ctx.progress):
        yield "generator", F.softplus(-critic(fake)).mean()  # the same fakes, the new critic


def eval_fn(networks, batch):
    images, noise = batch
    fake = networks["generator"](noise)
    scores = networks["critic"](fake)
    fooled = (scores > 0).to(scores.dtype).mean()
    ink = {"ink": fake.mean(), "ink_of_digits": images.mean()}
    return dtrain.Loss(F.softplus(-scores).mean(), metrics={"fooled": fooled} | ink)


def main():
    args = parse_args()
    dtrain.init(seed=args.seed)
    networks = make_networks()
    trainer = dtrain.Trainer(
        networks,
        make_optimizers(networks),
        loss_fn,
        updates=updates,
        eval_fn=eval_fn,
        callbacks=[ClipGradients(1.0, optimizer="generator"), Checkpoint(every_epochs=1, keep=2)],
        sinks=[Console(), JSONLines()],
        run_dir=args.run_dir,
    )
    data = Digits()
    trainer.fit(data, batch_size=args.batch_size, epochs=args.epochs, eval_set=data)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run-dir", default="runs/gan")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
