"""Three callbacks of one's own, each with another way to deal with many ranks.

    python examples/custom_callback.py
    bash launch/torchrun.sh examples/custom_callback.py

A callback runs on every rank. It may look at what is here (LogStepTime), ask for something
that all ranks then do (StopOnFile), or put together what every rank has (HardestDigit).
"""

import argparse
import time

import torch
from digits import load_data, make_model
from torch.nn import functional as F

import dtrain
from dtrain import Callback
from dtrain.sinks import Console, JSONLines


class LogStepTime(Callback):
    """Local: nothing is sent here. The mean over ranks is taken when figures are reported."""

    def on_step_start(self, ctx, step):
        self.began = time.perf_counter()

    def on_step_end(self, ctx, step):
        ctx.log("step_ms", 1000 * (time.perf_counter() - self.began))


class StopOnFile(Callback):
    """A request: `touch runs/custom_callback/STOP` ends the run.

    Ranks on other hosts may see the file later, or never. One that sees it is enough: all
    stop after the same step.
    """

    def on_step_end(self, ctx, step):
        if (ctx.run_dir / "STOP").exists():
            ctx.request.stop(f"found {ctx.run_dir / 'STOP'}")


class HardestDigit(Callback):
    """Communication: what ranks counted becomes one table, equal on all of them.

    Every rank must come to a line with `ctx.comm`: put none into an `if` that ranks may answer
    differently.
    """

    def on_eval_start(self, ctx):
        self.counts = torch.zeros(2, 10, dtype=torch.int64, device=ctx.device)

    def on_eval_batch(self, ctx, step):
        _, y = step.batch
        right = y[step.loss.outputs.argmax(-1) == y]
        self.counts += torch.stack([right.bincount(minlength=10), y.bincount(minlength=10)])

    def on_eval_end(self, ctx, metrics):
        right, seen = ctx.comm.all_reduce("counts of digits", self.counts)
        accuracy, digit = (right / seen).min(dim=0)
        metrics["eval/hardest_digit"] = digit.item()
        metrics["eval/hardest_digit_accuracy"] = accuracy.item()


def loss_fn(model, batch):
    x, y = batch
    logits = model(x)
    return dtrain.Loss(F.cross_entropy(logits, y), outputs=logits)  # outputs: for on_eval_batch


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--run-dir", default="runs/custom_callback", help="where files go")
    args = parser.parse_args()

    dtrain.init(seed=0)
    train_set, val_set = load_data()
    model = make_model()
    trainer = dtrain.Trainer(
        model,
        torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True),
        loss_fn,
        callbacks=[LogStepTime(), StopOnFile(), HardestDigit()],
        sinks=[Console(), JSONLines()],
        run_dir=args.run_dir,
    )
    trainer.fit(train_set, batch_size=64, epochs=args.epochs, eval_set=val_set)


if __name__ == "__main__":
    main()
