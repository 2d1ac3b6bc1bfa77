"""Trains a small convolutional network on scikit-learn's digits, on any number of ranks.

    python examples/digits.py                        # one process
    bash launch/torchrun.sh examples/digits.py       # every GPU, or two CPU processes
    RANKS=4 bash launch/torchrun.sh examples/digits.py --run-dir runs/four

The figures come out the same each time: the batch size is that of all ranks together.
"""

import argparse

import dtrain
import torch
from dtrain.callbacks import (
    Checkpoint,
    ClipGradients,
    EarlyStopping,
    GradientAccumulation,
    LRSchedule,
    MixedPrecision,
)
from dtrain.sinks import Console, JSONLines
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset


def load_data():
    """Returns 1437 images to train on and 360 to evaluate on, always the same ones."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
    y = torch.tensor(digits.target)
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, val = shuffled[:1437], shuffled[1437:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[val], y[val])


def make_model():
    # No BatchNorm and no dropout: they would see other samples, or other random numbers, at
    # another number of ranks.
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),  # [n, 64, 4, 4]
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def loss_fn(model, batch):
    x, y = batch
    logits = model(x)
    accuracy = (logits.argmax(-1) == y).float().mean()
    return dtrain.Loss(F.cross_entropy(logits, y), metrics={"accuracy": accuracy})


def main():
    args = parse_args()
    world = dtrain.init(seed=args.seed)  # before the model: all ranks then make the same one
    train_set, val_set = load_data()
    model = make_model()
    callbacks = [
        ClipGradients(max_norm=1.0),
        GradientAccumulation(micro_batch_size=args.micro_batch_size),
        LRSchedule(lambda opt, steps: OneCycleLR(opt, args.lr, total_steps=steps)),
        EarlyStopping("eval/accuracy", mode="max", patience=5, restore_best=True),
        Checkpoint(every_epochs=1, keep=2, best="eval/accuracy", mode="max"),
    ]
    if args.precision != "fp32":
        callbacks.append(MixedPrecision(args.precision))
    trainer = dtrain.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True),
        loss_fn,
        callbacks=callbacks,
        sinks=[Console(), JSONLines()],
        run_dir=args.run_dir,
    )
    trainer.fit(
        train_set,
        batch_size=args.batch_size,
        epochs=args.epochs,
        eval_set=val_set,
        resume=args.resume,
    )

    # The model holds its best weights now. Every rank evaluates, and all get the same figures.
    metrics = trainer.evaluate(val_set, batch_size=args.batch_size)
    if world.is_main:
        print(f"accuracy {metrics['eval/accuracy']:.2%}  loss {metrics['eval/loss']:.6f}")
        print(f"""
What next?
  the figures of every step     {args.run_dir}/metrics.jsonl
  the same on 4 ranks           RANKS=4 bash launch/torchrun.sh {__file__} --run-dir runs/four
  write a callback of your own  examples/custom_callback.py""")
    if metrics["eval/accuracy"] < args.target_accuracy:
        raise SystemExit(f"less than the target of {args.target_accuracy:.2%}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64, help="of all ranks together")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="of one rank at once")
    parser.add_argument("--lr", type=float, default=5e-3, help="the schedule's peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--run-dir", default="runs/digits")
    parser.add_argument("--resume", choices=("auto", "must", "never"), default="auto")
    parser.add_argument("--target-accuracy", type=float, default=0.0, help="exit with 1 below it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
