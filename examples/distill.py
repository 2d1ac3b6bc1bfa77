"""Teaches a small network what a larger one has learnt of scikit-learn's digits.

    python examples/distill.py                       # one process
    bash launch/torchrun.sh examples/distill.py      # a rank per GPU, or two on the CPU

Two trainings in one script, each with a run_dir of its own: of the teacher, which a later start
loads, and of the student, by the teacher's softened outputs (Hinton et al., 2015: "Distilling the
Knowledge in a Neural Network"). tests/ranks/test_distill.py has the loop that this spares, written
by hand.
"""

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import Checkpoint
from dtrain.sinks import Console, JSONLines

TEMPERATURE, LABELS = 4.0, 0.2  # how soft outputs are; what the labels count beside them


def make_data(dtype=torch.float32):
    x, y = (torch.tensor(one) for one in load_digits(return_X_y=True))
    x, val = x.to(dtype) / 16, torch.arange(len(x)) % 5 == 0
    return TensorDataset(x[~val], y[~val]), TensorDataset(x[val], y[val])


def make_teacher():
    return nn.Sequential(
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(256, 10),
    )


def make_student():
    return nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


def share(truths):
    return truths.float().mean()


def by_labels(model, batch):
    x, y = batch
    logits = model(x)
    accuracy = share(logits.argmax(-1) == y)
    return dtrain.Loss(F.cross_entropy(logits, y), metrics={"accuracy": accuracy})


def by_teacher(teacher):
    """Returns a loss function that holds the teacher: so it is in no gradient and no checkpoint.

    As a part of the model, `nn.ModuleDict({"student": ..., "teacher": ...})`, it would do as well,
    frozen: it is not reduced either, stays in eval mode, and is saved with the student.
    """

    def loss_fn(student, batch):
        x, y = batch
        logits = student(x)
        with torch.no_grad():
            taught = teacher(x)
        soft = F.kl_div(
            F.log_softmax(logits / TEMPERATURE, -1),
            F.log_softmax(taught / TEMPERATURE, -1),
            reduction="batchmean",  # a mean over samples, as the weight of a loss is
            log_target=True,
        )
        loss = LABELS * F.cross_entropy(logits, y) + (1 - LABELS) * TEMPERATURE**2 * soft
        told = logits.argmax(-1)
        metrics = {"accuracy": share(told == y), "as_taught": share(told == taught.argmax(-1))}
        return dtrain.Loss(loss, metrics=metrics)

    return loss_fn


def fit(model, loss_fn, run_dir, args, train_set, val_set):
    trainer = dtrain.Trainer(
        model,
        torch.optim.Adam(model.parameters(), lr=args.lr),
        loss_fn,
        callbacks=[Checkpoint(every_epochs=1, keep=2)],
        sinks=[Console(), JSONLines()],
        run_dir=run_dir,
    )
    options = {"batch_size": args.batch_size, "epochs": args.epochs, "eval_set": val_set}
    return trainer.fit(train_set, **options, log_every=1000)


def is_finished(run_dir):
    status = run_dir / "status.json"
    return status.exists() and json.loads(status.read_text())["status"] == "finished"


def main():
    args = parse_args()
    world = dtrain.init(seed=args.seed)
    data, run_dir = make_data(), Path(args.run_dir)
    teacher, student = make_teacher().to(world.device), make_student()
    if dtrain.on_main("is there a teacher?", lambda: is_finished(run_dir / "teacher")):
        dtrain.load_model(run_dir / "teacher", teacher)
    else:
        fit(teacher, by_labels, run_dir / "teacher", args, *data)
    teacher.eval()  # without dropout; what is no part of the model keeps its mode
    fit(student, by_teacher(teacher), run_dir / "student", args, *data)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run-dir", default="runs/distill")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
