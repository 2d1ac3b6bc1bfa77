"""The step under way, as hooks see it."""

from dataclasses import dataclass
from typing import Any, Protocol

from dtrain.context.values import Loss


class _Result(Protocol):
    """What became of a step, as :class:`Step` tells it. Asking may wait for the device."""

    @property
    def loss_mean(self) -> float: ...

    @property
    def weight(self) -> float: ...

    @property
    def nonfinite(self) -> int: ...

    @property
    def applied(self) -> bool: ...


@dataclass(slots=True)
class Step:
    """The step under way, handed to hooks.

    Attributes:
        number: how many global steps were taken before this one.
        micro: which micro-batch of this rank, from 0.
        micros: how many micro-steps this step has, equal on all ranks. A rank with fewer
            micro-batches, as of a ragged batch or a stream that has ended, idles in the last.
        samples: samples in the micro-batch, on this rank.
        batch: the micro-batch, on the device; writable in ``on_batch``.
        loss: what the loss function returned; writable in ``on_loss``.
        vetoed: why the update is not to be applied, if :meth:`veto` was called.
        result: what became of the step; behind :attr:`loss_mean`, :attr:`weight`,
            :attr:`nonfinite` and :attr:`applied`.
    """

    number: int
    micro: int = 0
    micros: int = 1
    samples: int = 0
    batch: Any = None
    loss: Loss | None = None
    vetoed: str = ""
    result: _Result | None = None

    @property
    def loss_mean(self) -> float:
        """From ``on_grads_ready`` on: the loss of the global batch, over all ranks.

        On CUDA, the first to ask for this or one of the next three in a step waits for it.
        """
        return float("nan") if self.result is None else self.result.loss_mean

    @property
    def weight(self) -> float:
        """From ``on_grads_ready`` on: units in the global batch, over all ranks."""
        return 0.0 if self.result is None else self.result.weight

    @property
    def nonfinite(self) -> int:
        """From ``on_grads_ready`` on: micro-batches, over all ranks, of NaN or infinite loss."""
        return 0 if self.result is None else self.result.nonfinite

    @property
    def applied(self) -> bool:
        """In ``on_step_end``: whether the optimizer's update was applied."""
        return self.result is not None and self.result.applied

    def veto(self, why: str) -> None:
        """In ``on_grads_ready``: leaves parameters and optimizer as they are in this step.

        Gradients are equal on all ranks there, so a rule that looks only at them, at the
        loss and at what is agreed decides alike on all of them; another rule must not veto.

        Ranks: all, local; must be called on all ranks or on none.
        """
        self.vetoed = why
