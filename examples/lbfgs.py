"""Logistic regression on scikit-learn's digits with LBFGS, on any number of ranks.

    python examples/lbfgs.py
    bash launch/torchrun.sh examples/lbfgs.py

LBFGS evaluates the loss several times in a step, along a line: on all ranks, over the whole batch.
The loss has one minimum, and in float64 it is the same to the last digits on any number of them.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dtrain


def make_data():
    x, y = (torch.tensor(one) for one in load_digits(return_X_y=True))
    return TensorDataset(x.double() / 16, y)


def make_optimizer(model):
    return torch.optim.LBFGS(model.parameters(), max_iter=8, line_search_fn="strong_wolfe")


def loss_fn(model, batch):
    x, y = batch
    penalty = 1e-2 * model.weight.square().sum()
    return F.cross_entropy(model(x), y) + penalty


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    dtrain.init(seed=0)
    data, model = make_data(), nn.Linear(64, 10).double()
    # All of the data in each step: a line search wants the same loss all along its way.
    trainer = dtrain.Trainer(model, make_optimizer(model), loss_fn)
    result = trainer.fit(data, batch_size=len(data), max_steps=args.steps, log_every=3)
    loss = trainer.evaluate(data, batch_size=len(data))["eval/loss"]
    dtrain.on_main("tell", lambda: print(f"loss after {result.steps} steps: {loss:.12f}"))


if __name__ == "__main__":
    main()
