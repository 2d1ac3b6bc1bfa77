"""Trains a small convolutional network on scikit-learn's digits, on any number of ranks.

    python examples/digits.py                        # one process
    bash launch/torchrun.sh examples/digits.py       # a rank per GPU, or two on the CPU
    RANKS=4 bash launch/torchrun.sh examples/digits.py --run-dir runs/digits-on-4

The figures come out the same: the batch size is that of one step, over all ranks.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import (
    Checkpoint,
    ClipGradients,
    EarlyStopping,
    GradientAccumulation,
    LRSchedule,
    MixedPrecision,
)
from dtrain.sinks import Console, Journal, JSONLines


def load_data():
    """Returns 1437 images to train on and 360 to evaluate on, always the same ones."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
    y = torch.tensor(digits.target)
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, val = shuffled[:1437], shuffled[1437:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[val], y[val])


def make_model():
    # No BatchNorm and no dropout: what they do depends on the number of ranks.
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),  # [n, 64 * 4 * 4]
        nn.Linear(64 * 4 * 4, 10),
    )


def loss_fn(model, batch):
    x, y = batch
    logits = model(x)
    accuracy = (logits.argmax(-1) == y).float().mean()
    return dtrain.Loss(F.cross_entropy(logits, y), metrics={"accuracy": accuracy})


def main():
    args = parse_args()
    world = dtrain.init(seed=args.seed)  # before the model is made: all ranks make the same one
    train_set, val_set = load_data()
    model = make_model()
    callbacks = [
        ClipGradients(max_norm=1.0),
        GradientAccumulation(micro_batch_size=args.micro_batch_size),
        LRSchedule(lambda opt, steps: OneCycleLR(opt, args.lr, total_steps=steps), every="step"),
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
        sinks=[Console(), JSONLines(), Journal()],
        run_dir=args.run_dir,
    )
    trainer.fit(
        train_set,
        batch_size=args.batch_size,
        epochs=args.epochs,
        eval_set=val_set,
        resume=args.resume,
    )

    # The model has its best weights again. All ranks evaluate; all get the same figures.
    metrics = trainer.evaluate(val_set, batch_size=args.batch_size)
    if world.is_main:
        ranks = 4 if world.device.type == "cpu" and world.size < 4 else 1
        command = os.path.relpath(Path(sys.executable).with_name("dtrain"))
        again = f"launch/torchrun.sh {sys.argv[0]} --run-dir {args.run_dir}-again"
        print(
            f"\nBest weights: accuracy {metrics['eval/accuracy']:.2%}, "
            f"loss {metrics['eval/loss']:.6f}\n"
            "What next?\n"
            f"  all figures of this run        {args.run_dir}/metrics.jsonl\n"
            f"  a page with its curves         {command} report {args.run_dir}\n"
            f"  the same, RANKS={ranks}              RANKS={ranks} bash {again}\n"
            "  write a callback of your own   examples/custom_callback.py"
        )
    if metrics["eval/accuracy"] < args.target_accuracy:
        sys.exit(f"accuracy is below the target of {args.target_accuracy:.2%}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--epochs", type=int, default=12)
    add("--batch-size", type=int, default=64, help="of one step, over all ranks (%(default)s)")
    add("--micro-batch-size", type=int, default=16, help="of one rank at once (%(default)s)")
    add("--lr", type=float, default=5e-3, help="at the schedule's peak (%(default)s)")
    add("--seed", type=int, default=0)
    # In 16 bits, the number of ranks shows in the fourth digit of the loss.
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    add("--run-dir", default="runs/digits", help="where files go (%(default)s)")
    add("--resume", choices=("auto", "must", "never"), default="auto")
    add("--target-accuracy", type=float, default=0.0, help="exit with status 1 below it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
