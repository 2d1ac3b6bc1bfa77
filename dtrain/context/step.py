"""What hooks and loss functions are handed, and what a loss function returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dtrain.errors import LossError

Number = float | int | Tensor
Figures = Mapping[str, "Number | Mean"]


@dataclass(frozen=True, slots=True)
class Mean:
    """A metric with a denominator of its own: ``total / weight``, summed over all ranks."""

    total: Number
    weight: Number


@dataclass(slots=True)
class Loss:
    """What a loss function returns: a mean, over how many units, and what else to report.

    Attributes:
        mean: 0-dim tensor with a gradient; a mean over ``weight`` units.
        weight: how many units (samples, tokens) the mean was over; a number or a 0-dim tensor.
            None means the samples of the micro-batch. With weight 0 nothing is contributed,
            even if the mean is NaN or has no gradient. (A weight on the GPU is not read: there a
            mean that was divided by 0 has a gradient of NaN all the same; :meth:`from_sum` has
            none.)
        metrics: name to value: a number or 0-dim tensor that is a mean over the same units,
            a :class:`Mean`, or a torchmetrics object: made once, outside of the loss function,
            updated in it (``f1.update(logits, y)``), and handed over itself (``{"f1": f1}``). Each
            report and evaluation computes it over all ranks' batches, and resets it.
        outputs: anything; reaches ``on_eval_batch``.
    """

    mean: Tensor
    weight: Number | None = None
    metrics: Figures = field(default_factory=dict)
    outputs: Any = None

    @classmethod
    def from_sum(
        cls, total: Tensor, weight: Number, metrics: Figures | None = None, outputs: Any = None
    ) -> "Loss":
        """A loss given as a sum over ``weight`` units. With weight 0 nothing is divided by 0."""
        safe = weight.masked_fill(weight == 0, 1) if isinstance(weight, Tensor) else weight or 1
        return cls(total / safe, weight, metrics or {}, outputs)


@dataclass(slots=True)
class Metrics:
    """What a function for evaluation may return instead: figures and outputs, without a loss.

    The evaluation then has no ``eval/loss``.

    Attributes:
        metrics: as :class:`Loss` has them.
        weight: how many units they are means over, likewise.
        outputs: likewise; what :class:`~dtrain.callbacks.EvalOutputs` brings together.
    """

    metrics: Figures = field(default_factory=dict)
    weight: Number | None = None
    outputs: Any = None

    @property
    def mean(self) -> Tensor:
        """Raises LossError: there is none."""
        raise LossError(
            "a callback looked for the loss of an evaluation whose function returned "
            "dtrain.Metrics, which has none: return dtrain.Loss, or leave the callback out"
        )


@dataclass(slots=True)
class Progress:
    """How far the run is. Equal on all ranks.

    Attributes:
        step: global steps taken since the run began, over all epochs and restarts.
        updates: steps whose optimizer update was applied; fewer than ``step`` where a
            loss scale overflowed or every rank skipped. With a fused optimizer on CUDA, a step
            is counted in the next one, or as soon as somebody asks for ``step.applied``.
        epoch: the epoch under way, from 0; after ``fit``, how many were finished.
        step_in_epoch: steps taken in this epoch.
        samples: samples all ranks trained on since the run began.
        total_steps: steps planned until this fit's end, or None where nobody can know.
        steps_per_epoch: steps planned in an epoch, or None.
        total_epochs: epochs planned until this fit's end, or None.
        phase: which of the run's fits this is, from 0.
        first_step: global steps before this fit.
        first_epoch: epochs finished before this fit.
    """

    step: int = 0
    updates: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    samples: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    total_epochs: int | None = None
    phase: int = 0
    first_step: int = 0
    first_epoch: int = 0

    def of_phase(self) -> "Progress":
        """Returns it counted from this fit's beginning, as its plan and its schedules are."""
        if not self.phase:
            return self
        step, epoch, total, epochs = self.step, self.epoch, self.total_steps, self.total_epochs
        return replace(
            self,
            step=step - self.first_step,
            epoch=epoch - self.first_epoch,
            total_steps=None if total is None else total - self.first_step,
            total_epochs=None if epochs is None else epochs - self.first_epoch,
        )


class _Result(Protocol):  # what became of a step; asking may wait for the device
    @property
    def loss_mean(self) -> float: ...

    @property
    def weight(self) -> float: ...

    @property
    def nonfinite(self) -> int: ...

    @property
    def applied(self) -> bool: ...

    @property
    def held(self) -> float | None: ...

    @property
    def loss(self) -> Tensor: ...


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
        loss: what the loss function returned; writable in ``on_loss``. In an evaluation whose
            function returns :class:`Metrics`: these.
        rows: in ``on_eval_batch``: the dataset's rows that were asked for; None of a stream.
        prefix: in ``on_eval_batch``: what the set's figures begin with, ``eval`` or ``eval/name``.
        vetoed: why the update is not to be applied, if :meth:`veto` was called.
        held: 0-dim, on the device: more than 0 where the update is not to be applied, if
            :meth:`veto_where` was called, whose flags are its bits.
        result: what became of the step; behind the properties below.
        update: of several, the name of the update under way: of each alone are ``loss``,
            ``vetoed`` and the properties below, which are the last one's in ``on_step_end``.
        ends: whether that is the step's last.
        done: by name, what became of the updates so far.
        counted: for the loop: whether one of them was applied.
        replayed: the step's micro-batches run again, for an optimizer that takes a closure.
    """

    number: int
    micro: int = 0
    micros: int = 1
    samples: int = 0
    batch: Any = None
    loss: Loss | None = None
    rows: list[int] | None = None
    prefix: str = ""
    vetoed: str = ""
    held: Tensor | None = None
    _flags: int = 0
    result: _Result | None = None
    update: str = ""
    ends: bool = True
    done: tuple[tuple[str, _Result], ...] = ()
    counted: bool = False
    replayed: bool = False

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
        """In ``on_step_end``: whether the optimizer's update was applied; of several, any."""
        if self.done:
            return any(result.applied for _, result in self.done)
        return self.result is not None and self.result.applied

    def applied_to(self, optimizer: int | str) -> bool:
        """As :attr:`applied`, of the update of that name, if the step had it."""
        its = [result.applied for name, result in self.done if name == optimizer]
        return any(its) if its else self.applied

    def veto(self, why: str) -> None:
        """In ``on_grads_ready``: leaves parameters and optimizer as they are in this step.

        Gradients are equal on all ranks there, so a rule that looks only at them, at the
        loss and at what is agreed decides alike on all of them; another rule must not veto.

        Ranks: all, local; must be called on all ranks or on none.
        """
        self.vetoed = why

    def veto_where(self, flag: Tensor) -> int:
        """As :meth:`veto`, where ``flag`` is 1, and not where it is 0: without waiting for it.

        0-dim float32 on the device. Returns a number by which :meth:`left_out` tells in
        ``on_step_end`` what became of it.

        Ranks: all, local; must be called on all ranks, with the same flag, or on none.
        """
        number, self._flags = self._flags, self._flags + 1
        self.held = flag if self.held is None else self.held.add(flag, alpha=2**number)
        return number

    def one_flag(self) -> Tensor | None:
        """Returns 1 where any of the flags is, else 0; for the loop."""
        return self.held if self.held is None or self._flags == 1 else self.held.clamp(max=1.0)

    def left_out(self, number: int | None = None) -> bool:
        """In ``on_step_end``: whether a veto, or that of this number, held the update back."""
        flags = 0
        if self.held is not None and self.result is not None and not self.applied:
            arrived = self.result.held
            flags = int(float(self.held) if arrived is None else arrived)
        if number is None:
            return bool(self.vetoed) or flags > 0
        return flags >> number & 1 > 0

    def mean_loss(self) -> Tensor:
        """In ``on_grads_ready``: :attr:`loss_mean` as a 0-dim tensor, for which nothing waits."""
        assert self.result is not None
        return self.result.loss


def on_device(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a number as a 0-dim tensor on the device, without waiting for it."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype).reshape(())
    # To copy it, as `as_tensor` does, the host would wait for all that the device has to do.
    return torch.full((), value, dtype=dtype, device=device)
