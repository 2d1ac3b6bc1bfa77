"""What it costs that no rank is left behind: a training step with all control, and without.

    launch/torchrun.sh benchmarks/control.py                     # RANKS=2 unless set
    launch/torchrun.sh benchmarks/control.py --workload mlp

Two trainings live in the same processes and take turns, in fits of a few hundred steps: one as it
is, the other with hang_after_s=None and with what the control plane does in a step taken out (the
activity that the watchdog reads, the stop-watches that name stragglers, the place that an error
would be told with). Votes travel in the lane, which benchmarks/lane.py measures. A figure is the
median, over rounds, of the ratio of median steps within a round, with the interval that this median
lies in with 95 % confidence; "again" is the training without, once more.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from lane import GPT, compare, mlp
from torch import nn
from torch.nn import functional as F

import dtrain
from dtrain.distributed.activity import Activity
from dtrain.distributed.comm import Comm
from dtrain.watchdog.straggler import StragglerClock


class Times(dtrain.Callback):
    """Takes the time from each step's end to the next one's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_fit_start(self, ctx: dtrain.Context) -> None:
        self.seconds, self._last = [], None

    def on_step_end(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def median_step(step: Callable[[Any], None], batches: Iterator[Any], steps: int) -> float:
    """Returns the median of so many steps' seconds, each with the fetching of its batch."""
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step(next(batches))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Yields batches, one epoch after the other."""
    while True:
        yield from loader


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def dataset(workload: str, ranks: int) -> torch.utils.data.TensorDataset:
    torch.manual_seed(0)
    if workload == "mlp":
        rows = 16 * ranks * 10
        return torch.utils.data.TensorDataset(torch.randn(rows, 64), torch.randint(10, (rows,)))
    rows = 8 * ranks * 10
    tokens = torch.randint(256, (2, rows, 64))
    return torch.utils.data.TensorDataset(tokens[0], tokens[1])


class Training:
    """One of the trainings: a Trainer that takes a few more steps at a time."""

    def __init__(self, workload: str, world: dtrain.World, *, controlled: bool) -> None:
        torch.manual_seed(0)
        model = mlp() if workload == "mlp" else GPT()
        self.times = Times()
        self.controlled = controlled
        self.trainer = dtrain.Trainer(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
            loss_fn,
            callbacks=[self.times],
            sinks=[],
            **({} if controlled else {"hang_after_s": None}),
        )
        self.data = dataset(workload, world.size)
        self.batch_size = (16 if workload == "mlp" else 8) * world.size

    def median_step(self, steps: int) -> float:
        """Takes some steps; returns the seconds of a median one."""
        with ExitStack() as stack:
            if not self.controlled:
                stack.enter_context(uncontrolled())
            self.trainer.fit(
                self.data,
                batch_size=self.batch_size,
                max_steps=self.trainer.context.progress.step + steps,
                log_every=steps,
            )
        return statistics.median(self.times.seconds)


@contextmanager
def uncontrolled() -> Iterator[None]:
    """Takes out what control does in a step."""

    def nothing(self: object, *args: object, **options: object) -> None:
        pass

    @contextmanager
    def alone(self: Comm, where: object) -> Iterator[None]:
        yield

    with ExitStack() as stack:
        for owner, names in {
            Activity: ["enter", "begin_step", "end_lap", "has_data"],
            StragglerClock: ["begin_step", "waited_for_data", "forwarded", "reduced", "end_step"],
            Comm: ["mark_step"],
        }.items():
            for name in names:
                stack.enter_context(patch.object(owner, name, nothing))
        stack.enter_context(patch.object(Comm, "alone", alone))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=["mlp", "gpt"], default="gpt")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=30, help="of a training at a time")
    arguments = parser.parse_args()
    with dtrain.init(seed=0) as world:
        torch.set_num_threads(1)
        trainings = {
            name: Training(arguments.workload, world, controlled=name == "with")
            for name in ("without", "again", "with")
        }
        seconds: dict[str, list[float]] = {name: [] for name in trainings}
        order = random.Random(0)  # alike on all ranks
        for number in range(-2, arguments.rounds):  # two rounds to warm up
            for name in order.sample(list(trainings), len(trainings)):
                took = trainings[name].median_step(arguments.steps)
                if number >= 0:
                    seconds[name].append(took)
        if not world.is_main:
            return
        print(f"{arguments.workload}, {world.size} ranks, {arguments.rounds} rounds")
        print(f"{'':9} median  (95 %)            fastest tenth")
        for name, times in seconds.items():
            one = compare(times, seconds["without"])
            low, high = one["interval"]
            interval = f"({low:.3f} to {high:.3f})"
            print(f"{name:9} {one['ratio']:.3f}   {interval}  {one['fastest_tenth']:.3f}")


if __name__ == "__main__":
    main()
