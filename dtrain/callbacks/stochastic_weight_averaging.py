"""Stochastic weight averaging: the mean of the weights that the last epochs ended with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_swa_multi_avg_fn

from dtrain.callback import Callback
from dtrain.context import Context, Step
from dtrain.errors import ConfigError


class StochasticWeightAveraging(Callback):
    """Averages the weights from an epoch on, and leaves the average in the model.

    Each epoch's last weights count the same (Izmailov et al., "Averaging Weights Leads to
    Wider Optima and Better Generalization", UAI 2018). The paper holds the learning rate
    constant or cyclic meanwhile, as torch's ``SWALR`` does.

    Parameters that require a gradient are averaged, in float32 at least. Evaluations in ``fit``
    and checkpoints see the model's own weights; after ``fit`` the model holds the average, so
    ``Trainer.evaluate`` sees that. Its BatchNorm statistics are those of the last weights:
    before you use it, call ``torch.optim.swa_utils.update_bn(loader, trainer.model, device)`` on
    every rank, with the same batches.

    Example::

        callbacks = [StochasticWeightAveraging(start_epoch=8)]
        trainer = Trainer(model, optimizer, loss_fn, callbacks=callbacks)
        trainer.fit(train_set, batch_size=64, epochs=12)
        metrics = trainer.evaluate(val_set)

    Args:
        start_epoch: the first epoch whose weights count; epochs are counted from 0.
        every_steps: average after every so many applied updates instead, from the start of that
            epoch on.

    Raises:
        ConfigError: an argument is off.

    Ranks: all, local; parameters are equal on all ranks, and so is their average.
    """

    def __init__(self, start_epoch: int, *, every_steps: int | None = None) -> None:
        if isinstance(start_epoch, bool) or start_epoch < 0:
            raise ConfigError(
                f"StochasticWeightAveraging(start_epoch={start_epoch!r}): must be 0 or more"
            )
        if every_steps is not None and (isinstance(every_steps, bool) or every_steps < 1):
            raise ConfigError(
                f"StochasticWeightAveraging(every_steps={every_steps!r}): must be 1 or more"
            )
        self._start_epoch = start_epoch
        self._every_steps = every_steps
        self.count = 0
        self.averages: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}  # the model's weights, while the average is in it

    def on_fit_start(self, ctx: Context) -> None:
        """Takes the average out again, if an earlier ``fit`` left it in the model."""
        _copy(ctx, self._own)
        self._own = {}

    def on_step_end(self, ctx: Context, step: Step) -> None:
        """Averages, if it goes by steps and the optimizer has stepped."""
        every = self._every_steps
        if every is not None and step.applied and ctx.progress.updates % every == 0:
            self._average(ctx)

    def on_epoch_end(self, ctx: Context) -> None:
        """Averages, if it goes by epochs."""
        if self._every_steps is None:
            self._average(ctx)

    def on_fit_end(self, ctx: Context) -> None:
        """Leaves the average in the model."""
        if not self.count:
            ctx.say(
                f"StochasticWeightAveraging: fit ended before the end of epoch {self._start_epoch} "
                "(from 0), so nothing was averaged; the model holds its own weights"
            )
            return
        named = dict(ctx.model.named_parameters())
        self._own = {name: named[name].detach().clone() for name in self.averages}
        _copy(ctx, self.averages)
        if any(isinstance(module, _BatchNorm) for module in ctx.model.modules()):
            ctx.say(
                f"the model holds the average of {self.count} sets of weights; its BatchNorm "
                "statistics are of the last one: call torch.optim.swa_utils.update_bn on every rank"
            )

    def _average(self, ctx: Context) -> None:
        if ctx.progress.epoch < self._start_epoch:
            return
        named = dict(ctx.model.named_parameters())
        for name, p in named.items():
            if name in self.averages:
                self.averages[name] = self.averages[name].to(p.device)  # from a checkpoint: the CPU
            elif p.requires_grad:  # from now on; while it was frozen, it was what it is
                wide = torch.promote_types(p.dtype, torch.float32)
                self.averages[name] = p.detach().to(wide, copy=True)
        averages = list(self.averages.values())
        current = [named[name].detach().to(a.dtype) for name, a in self.averages.items()]
        get_swa_multi_avg_fn()(averages, current, self.count)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the average, and of how many."""
        return {"averages": self.averages, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.averages, self.count = dict(state["averages"]), state["count"]


@torch.no_grad()
def _copy(ctx: Context, values: dict[str, Tensor]) -> None:
    named = dict(ctx.model.named_parameters())
    if values:
        torch._foreach_copy_([named[name] for name in values], list(values.values()))
