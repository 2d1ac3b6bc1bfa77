"""What a fit of one step costs, against a step of a long fit.

    python benchmarks/fits.py
    RANKS=2 launch/torchrun.sh benchmarks/fits.py
    RANKS=2 launch/torchrun.sh benchmarks/fits.py --checkpoints 20

An MLP whose step takes some 10 ms is trained, in turns, by a fit of one epoch of many steps and by
as many fits of one step. A figure is the median over rounds of the ratio of the two, with the least
and the most.
With ``--checkpoints N`` both save: the long fit at its end, the short ones every N of them.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import Checkpoint

BATCH, FEATURES, WIDTH = 896, 64, 384


def loss_fn(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fits", type=int, default=40, help="of one step, in a round")
    parser.add_argument("--checkpoints", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    world = dtrain.init(seed=0)
    torch.manual_seed(0)
    x = torch.randn(BATCH * args.fits, FEATURES)
    many = TensorDataset(x, (x.sum(1) > 0).long())
    one = TensorDataset(*many[:BATCH])
    hidden = [nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(WIDTH, 2))
    saves = args.checkpoints > 0
    folder = dtrain.on_main("a folder", lambda: tempfile.mkdtemp())
    trainer = dtrain.Trainer(
        model,
        torch.optim.SGD(model.parameters(), 0.01),
        loss_fn,
        callbacks=[Checkpoint(every_fits=args.checkpoints)] if saves else [],
        sinks=[],
        run_dir=Path(folder) / "run" if saves else None,
    )
    trainer.fit(many, batch_size=BATCH, max_steps=20)
    ratios, steps = [], []
    for _ in range(args.rounds):
        began = time.perf_counter()
        trainer.fit(many, batch_size=BATCH, max_steps=args.fits, log_every=1000)
        between = time.perf_counter()
        for _ in range(args.fits):
            trainer.fit(one, batch_size=BATCH, max_steps=1)
        ratios.append((time.perf_counter() - between) / (between - began))
        steps.append((between - began) / args.fits)
    if world.is_main:
        step, ratio = statistics.median(steps) * 1e3, statistics.median(ratios)
        saved = f", a save every {args.checkpoints} fits" if saves else ""
        print(
            f"{world.size} ranks, a step of {step:.1f} ms{saved}: a fit of one step takes "
            f"{ratio:.2f} times that ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
