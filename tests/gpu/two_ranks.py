"""What two or three ranks do; started by torchrun from test_ranks_on_gpus.py.

two_ranks.py OUT BACKEND DEVICE
"""

import json
import sys
from pathlib import Path

import pytest
import stand_in
import torch
import torch.distributed as dist
import training
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import ClipGradients, GradientAccumulation, MixedPrecision

STEPS = 12


class StopsAndSkips(dtrain.Callback):
    """Rank 0 leaves step 3 out; the last rank asks for a stop in step 8."""

    def __init__(self, world):
        self._world = world

    def on_batch(self, ctx, step):
        if step.number == 3 and self._world.rank == 0 and self._world.size > 1:
            ctx.request.skip("planted")
        if step.number == 8 and self._world.rank == self._world.size - 1:
            ctx.request.stop("enough")


def train(world, strategy, *, precision=None, broken=False, votes=False):
    def loss(net, batch, ctx):
        if broken and ctx.progress.step == 3 and world.rank == world.size - 1:
            raise ValueError("planted")
        return training.loss_fn(net, batch)

    watch = training.Watch()
    trainer = dtrain.Trainer(
        training.model(),
        training.adamw,
        loss,
        callbacks=[
            *([MixedPrecision(precision)] if precision else []),
            ClipGradients(training.CLIP),
            *([StopsAndSkips(world)] if votes else []),
            watch,
        ],
        sinks=[],
        strategy=strategy,
    )
    found = {"backend": world.backend, "device": str(world.device)}
    try:
        # Ragged, and of an odd size: ranks' shares differ, and so gradients need another factor.
        data = dtrain.Data(training.dataset(STEPS * 31 - 7), 31, shuffle=False)
        result = trainer.fit(data, max_steps=STEPS, log_every=5)
        found["steps"], found["stop"] = result.steps, result.stop_reason
    except (ValueError, dtrain.errors.DtrainError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    progress = trainer.context.progress
    found["counts"] = [progress.step, progress.updates, progress.samples]
    found["losses"] = watch.figures.losses
    found["weights"] = training.flat(trainer.model).tolist()
    return found


def all_cases(world):
    found = {}
    for strategy in ("ddp", "flat"):
        found[f"{strategy}"] = train(world, strategy)
        found[f"{strategy} bf16"] = train(world, strategy, precision="bf16")
        found[f"{strategy} fp16"] = train(world, strategy, precision="fp16")
        found[f"{strategy} votes"] = train(world, strategy, votes=True)
        found[f"{strategy} error"] = train(world, strategy, broken=True)
    return found


def exact_cases(world):
    """In float64, clipped, with and without micro-batches; shares and the last batch are ragged."""
    found, rows = {}, training.dataset(STEPS * 31 - 7).tensors
    data = dtrain.Data(TensorDataset(rows[0].double(), rows[1]), 31, shuffle=False)
    for strategy in ("ddp", "flat"):
        for micros in (1, 3):
            watch = training.Watch()
            trainer = dtrain.Trainer(
                training.model().double(),
                training.adamw,
                training.loss_fn,
                callbacks=[
                    *([GradientAccumulation(micros)] if micros > 1 else []),
                    ClipGradients(0.3),  # what this model's gradients exceed
                    watch,
                ],
                sinks=[],
                strategy=strategy,
            )
            trainer.fit(data, epochs=1)
            found[f"{strategy}, {micros} micro-batches"] = {
                "losses": watch.figures.losses,
                "weights": [
                    p.detach().cpu().flatten().tolist() for p in trainer.model.parameters()
                ],
            }
    return found


def main():
    out, backend, device = sys.argv[1:]
    if device == "cpu":
        stand_in.pretend(pytest.MonkeyPatch())
    elif backend == "gloo":
        # NCCL takes no two ranks on one GPU. dtrain takes a group that is there.
        dist.init_process_group("gloo")
    with dtrain.init(seed=0) as world:
        assert world.device.type == device
        found = exact_cases(world) | (all_cases(world) if world.size == 2 else {})
        Path(out, f"{world.rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
