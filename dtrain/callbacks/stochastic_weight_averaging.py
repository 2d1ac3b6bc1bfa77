"""Stochastic weight averaging: the mean of the weights that the last epochs ended with."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_swa_multi_avg_fn

from dtrain.callback import CountAs
from dtrain.callbacks.argument_checks import check_counts
from dtrain.callbacks.averaged_weights import AveragedWeights
from dtrain.context import Context, Step


class StochasticWeightAveraging(AveragedWeights):
    """Averages the weights from an epoch on, and leaves the average in the model.

    Each epoch's last weights count the same (Izmailov et al., "Averaging Weights Leads to
    Wider Optima and Better Generalization", UAI 2018). The paper holds the learning rate
    constant or cyclic meanwhile, as torch's ``SWALR`` does.

    Parameters that require a gradient are averaged, in float32 at least. Evaluations in ``fit`` see
    the model's own weights; after ``fit`` it holds the average, which ``Trainer.evaluate`` sees and
    ``load_model`` gives. Its BatchNorm statistics are those of the last weights: first
    call ``torch.optim.swa_utils.update_bn(loader, trainer.model, device)`` on every rank, with the
    same batches; of a sharded model, in a whole one that ``load_model`` has filled.

    Args:
        start_epoch: the first epoch whose weights count; epochs are counted from 0.
        every_steps: average after every so many applied updates instead, from that epoch on.
    """

    late_step_end = True  # the parameters are still those of the step

    def __init__(self, start_epoch: int, *, every_steps: int | None = None) -> None:
        super().__init__()
        check_counts("StochasticWeightAveraging", least=0, start_epoch=start_epoch)
        check_counts("StochasticWeightAveraging", or_none=True, every_steps=every_steps)
        self._start_epoch = start_epoch
        self._every_steps = every_steps
        self.count = 0
        self._phase = 0  # of the run's fits, the one that is averaged

    def on_fit_start(self, ctx: Context) -> None:
        super().on_fit_start(ctx)
        if ctx.progress.phase != self._phase:
            self._phase = ctx.progress.phase
            self.averages, self.count = {}, 0

    def on_step_end(self, ctx: Context, step: Step) -> None:
        every = self._every_steps
        if every is not None and step.applied and ctx.progress.updates % every == 0:
            self._take_in(ctx)

    def on_epoch_end(self, ctx: Context) -> None:
        if self._every_steps is None:
            self._take_in(ctx)

    def on_fit_end(self, ctx: Context) -> None:
        if not self.count:
            ctx.say(
                f"StochasticWeightAveraging: fit ended before the end of epoch {self._start_epoch} "
                "(from 0), so nothing was averaged; the model holds its own weights"
            )
            return
        if any(isinstance(module, _BatchNorm) for module in ctx.model.modules()):
            where = "after load_model, in a model that is not sharded, "
            where = where if ctx.sharded else "on every rank, and after load_model, "
            ctx.say(
                f"the model holds the average of {self.count} sets of weights; its BatchNorm "
                f"statistics are of the last one: {where}call torch.optim.swa_utils.update_bn"
            )

    def weights(self, which: CountAs) -> Mapping[str, Tensor] | None:
        return self.averages if self.count and which in ("averaged", "final") else None

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.count = state["count"]

    def _take_in(self, ctx: Context) -> None:
        if ctx.progress.of_phase().epoch >= self._start_epoch:
            if self._taken != ctx._taken:
                self._follow(ctx)
            self._begin(ctx)
            self._average(get_swa_multi_avg_fn(), self.count)
            self.count += 1
