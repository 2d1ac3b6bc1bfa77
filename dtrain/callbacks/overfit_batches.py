"""For debugging: trains on a few batches again and again."""

from typing import Any

from dtrain.callback import Callback
from dtrain.callbacks.argument_checks import check_counts
from dtrain.context import Context, Step


class OverfitBatches(Callback):
    """Trains on the first ``n`` global batches only. A model that learns drives their loss to 0.

    If it does not, look for a bug in the model, the loss or the learning rate before you train
    on more. Evaluations are as ever. Each rank keeps its micro-batches of the first ``n`` steps in
    memory, or, since checkpoints do not hold them, of the first after a resume. Where a step has
    fewer micro-batches than the one it stands for (at the ragged end of an epoch), it trains on as
    many as it has; where it has more, it skips the others.

    Args:
        n: how many global batches.
    """

    def __init__(self, n: int = 1) -> None:
        check_counts("OverfitBatches", n=n)
        self._n = n
        self._first = -1  # the step in which keeping began
        self._kept: dict[tuple[int, int], tuple[Any, int]] = {}

    def on_fit_start(self, ctx: Context) -> None:
        if self._first >= 0:
            return  # a second fit goes on with the same batches
        self._first = ctx.progress.step
        since = f" after step {self._first}, where it was resumed" if self._first else ""
        ctx.say(
            f"DEBUGGING, not training: OverfitBatches trains on the first {self._n} global "
            f"batches{since} again and again. Remove it for a real run."
        )

    def on_batch(self, ctx: Context, step: Step) -> None:
        age = step.number - self._first
        place = (age % self._n, step.micro)
        if age < self._n:
            self._kept[place] = (step.batch, step.samples)
        elif place in self._kept:
            step.batch, step.samples = self._kept[place]
        else:
            ctx.request.skip("OverfitBatches: the kept step has fewer micro-batches")
