"""What hooks are handed: progress, the step, its loss, requests, reports and the context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.comm import Comm
from dtrain.errors import ConfigError

Number = float | int | Tensor


@dataclass(slots=True)
class Progress:
    """How far the run is. Equal on all ranks.

    Attributes:
        step: global steps taken since the run began, over all epochs and restarts.
        updates: steps whose optimizer update was applied; fewer than ``step`` where a
            loss scale overflowed or every rank skipped. With a fused optimizer on CUDA, the
            step just taken is counted once its outcome has arrived: in the next step, or as soon
            as somebody asks for ``step.applied``.
        epoch: the epoch under way, from 0; after ``fit``, how many were finished.
        step_in_epoch: steps taken in this epoch.
        samples: samples all ranks trained on since the run began.
        total_steps: steps planned, or None where nobody can know.
        steps_per_epoch: steps planned in an epoch, or None.
        total_epochs: epochs planned, or None.
    """

    step: int = 0
    updates: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    samples: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    total_epochs: int | None = None


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
            even if the mean is NaN. (A weight on the GPU is not read: there a mean that was
            divided by 0 has a gradient of NaN all the same; :meth:`from_sum` has none.)
        metrics: name to value: a number or 0-dim tensor that is a mean over the same units,
            or a :class:`Mean`.
        outputs: anything; reaches ``on_eval_batch``.
    """

    mean: Tensor
    weight: Number | None = None
    metrics: Mapping[str, Number | Mean] = field(default_factory=dict)
    outputs: Any = None

    @classmethod
    def from_sum(
        cls,
        total: Tensor,
        weight: Number,
        metrics: Mapping[str, Number | Mean] | None = None,
        outputs: Any = None,
    ) -> Loss:
        """A loss given as a sum over ``weight`` units. With weight 0 nothing is divided by 0."""
        if isinstance(weight, Tensor):
            safe: Number = torch.where(weight == 0, torch.ones_like(weight), weight)
        else:
            safe = weight or 1
        return cls(total / safe, weight, metrics or {}, outputs)


class Outcome(Protocol):
    """What became of a step. Asking may wait for the device."""

    @property
    def loss_mean(self) -> float:
        """The loss of the global batch."""
        ...

    @property
    def weight(self) -> float:
        """Units in the global batch."""
        ...

    @property
    def nonfinite(self) -> int:
        """Micro-batches whose loss was NaN or infinite."""
        ...

    @property
    def applied(self) -> bool:
        """Whether the optimizer's update was applied."""
        ...


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
        outcome: what became of the step; behind :attr:`loss_mean`, :attr:`weight`,
            :attr:`nonfinite` and :attr:`applied`.
    """

    number: int
    micro: int = 0
    micros: int = 1
    samples: int = 0
    batch: Any = None
    loss: Loss | None = None
    vetoed: str = ""
    outcome: Outcome | None = None

    @property
    def loss_mean(self) -> float:
        """From ``on_grads_ready`` on: the loss of the global batch, over all ranks.

        On CUDA, the first to ask for this or one of the next three in a step waits for it.
        """
        return float("nan") if self.outcome is None else self.outcome.loss_mean

    @property
    def weight(self) -> float:
        """From ``on_grads_ready`` on: units in the global batch, over all ranks."""
        return 0.0 if self.outcome is None else self.outcome.weight

    @property
    def nonfinite(self) -> int:
        """From ``on_grads_ready`` on: micro-batches, over all ranks, of NaN or infinite loss."""
        return 0 if self.outcome is None else self.outcome.nonfinite

    @property
    def applied(self) -> bool:
        """In ``on_step_end``: whether the optimizer's update was applied."""
        return self.outcome is not None and self.outcome.applied

    def veto(self, why: str) -> None:
        """In ``on_grads_ready``: leaves parameters and optimizer as they are in this step.

        Gradients are equal on all ranks there, so a rule that looks only at them, at the
        loss and at what is agreed decides alike on all of them; another rule must not veto.

        Ranks: all, local; must be called on all ranks or on none.
        """
        self.vetoed = why


ReportKind = Literal["start", "train", "eval", "sample", "message", "end"]
Reduce = Literal["mean", "sum", "max", "last"]


@dataclass(frozen=True, slots=True)
class Report:
    """Numbers for sinks; nothing in it can reach another rank.

    Attributes:
        kind: ``start`` and ``end`` of a run, ``train`` and ``eval`` figures, a ``message``, or
            a ``sample``: a text or picture.
        step: global steps taken.
        epoch: the epoch, from 0.
        values: name to value, such as ``train/loss``, ``eval/accuracy``, ``lr``.
        text: for ``start``, ``message`` and ``end``: what to tell a person, in plain words.
        seconds: since ``fit`` began.
        samples: samples all ranks trained on since ``fit`` began.
        total_steps: steps planned, or None.
        steps_per_epoch: steps planned in an epoch, or None.
        config: for ``start``: the user's own settings.
        sample: for ``sample``: what to show.
    """

    kind: ReportKind
    step: int
    epoch: int
    values: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    seconds: float = 0.0
    samples: int = 0
    total_steps: int | None = None
    steps_per_epoch: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    sample: Shown | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """A text or a picture for the sinks.

    Attributes:
        name: what it is.
        text: any text.
        image: 8-bit values, ``[height, width]`` or ``[height, width, 3]``; or None.
    """

    name: str
    text: str = ""
    image: Any = None


@dataclass(slots=True)
class Logged:
    """Values logged under one name since the last sync point."""

    reduce: Reduce
    values: list[Number] = field(default_factory=list)


class Request:
    """What a callback asks of the run. Nothing here communicates; the loop makes it agreed.

    Ranks: all, local.
    """

    __slots__ = ("pending", "skippable", "skipped")

    def __init__(self) -> None:
        self.pending: dict[str, list[str]] = {"stop": [], "save": [], "preempt": []}
        self.skippable = False
        self.skipped: list[str] = []

    def stop(self, why: str) -> None:
        """Asks that all ranks stop after the same step. One rank's wish suffices."""
        self.pending["stop"].append(why)

    def save(self, why: str) -> None:
        """Asks for a checkpoint, made by all ranks at the same step."""
        self.pending["save"].append(why)

    def preempt(self, why: str) -> None:
        """Asks to save and leave: the run is to be continued by another start."""
        self.pending["preempt"].append(why)

    def skip(self, why: str) -> None:
        """Leaves this rank's micro-batch out, as if its weight were 0.

        Raises:
            ConfigError: called outside of ``on_batch`` and ``on_loss``.
        """
        if not self.skippable:
            raise ConfigError(
                f"request.skip({why!r}) works in on_batch and on_loss only: elsewhere no "
                "micro-batch is under way that could be left out"
            )
        self.skipped.append(why)


@dataclass(eq=False)
class Context:
    """What every hook gets first.

    Attributes:
        model: the user's own module, never wrapped.
        optimizer: the user's own optimizer.
        progress: how far the run is.
        comm: verbs between ranks; all ranks must call them.
        request: ask to stop, skip or save; never communicates.
        rng: a generator of this rank's own.
        shared_rng: a generator that is equal on all ranks.
        device: where this rank computes.
        run_dir: where the run keeps its files, or None.
        loss_scaled: whether the precision scales the loss; a gradient that overflows is then
            no trouble.
        has_eval: whether `fit` was given an eval_set.
        metrics: the newest agreed metrics, equal on all ranks.
    """

    model: nn.Module
    optimizer: Optimizer
    progress: Progress
    comm: Comm
    request: Request
    rng: torch.Generator
    shared_rng: torch.Generator
    device: torch.device
    run_dir: Path | None
    has_eval: bool = False
    loss_scaled: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    logged: dict[str, Logged] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    run_loss: Callable[[Any], Loss] | None = None
    list_gradients: Callable[[], list[Tensor]] | None = None
    measure_gradients: Callable[[], Tensor] | None = None

    def log(self, name: str, value: Number, reduce: Reduce = "mean") -> None:
        """Keeps a value; all values are reported as one number at the next sync point.

        The value is not read here, so a CUDA tensor costs no sync.

        Args:
            name: what to report it as; the same name always with the same ``reduce``.
            value: a number or a 0-dim tensor.
            reduce: over calls and ranks: their ``"mean"``, ``"sum"`` or ``"max"``; ``"last"`` is
                the mean over ranks of each rank's last value.

        Raises:
            ConfigError: ``reduce`` is none of these, or another than before.

        Ranks: all, local.
        """
        if reduce not in get_args(Reduce):
            raise ConfigError(f"log({name!r}, reduce={reduce!r}): one of {get_args(Reduce)}")
        logged = self.logged.setdefault(name, Logged(reduce))
        if logged.reduce != reduce:
            raise ConfigError(
                f"log({name!r}, reduce={reduce!r}): it was logged with {logged.reduce!r} before"
            )
        logged.values.append(value.detach() if isinstance(value, Tensor) else value)

    def alive(self) -> None:
        """Says that this rank is still at work, where a hook or a loss function takes long.

        In the middle of a step a hook that says nothing is taken for stuck after
        ``Trainer(hang_after_s=...)`` seconds, or ten times the slowest recent step.

        Ranks: all, local.
        """
        self.comm.pulse.go(self.comm.pulse.place)

    def slowly(self, what: str) -> AbstractContextManager[None]:
        """Returns a block in which one call may take minutes, in the middle of a step.

        Example::

            with ctx.slowly("writing the trace"):
                profiler.export_chrome_trace(path)

        Args:
            what: for messages.

        Ranks: all, local.
        """
        return self.comm.pulse.slowly(what)

    def loss_of(self, batch: Any) -> Loss:
        """Runs the loss function once more, as training would, for debugging.

        The model's parameters get no gradient by this alone.

        Ranks: all, local, unless the loss function communicates.
        """
        if self.run_loss is None:
            raise ConfigError("loss_of works during fit only")
        return self.run_loss(batch)

    def gradients(self) -> list[Tensor]:
        """In ``on_grads_ready``: tensors that hold all gradients, and otherwise zeros only.

        For what is done to all of them alike, such as a norm: there may be fewer of them than of
        parameters. What is done to them in place is done to the gradients.

        Raises:
            ConfigError: called outside of ``fit``.

        Ranks: all, local; the gradients are equal on all ranks.
        """
        if self.list_gradients is None:
            raise ConfigError("gradients() works during fit only")
        return self.list_gradients()

    def gradient_norm(self) -> Tensor:
        """In ``on_grads_ready``: the joint Euclidean norm of all gradients, 0-dim.

        Raises:
            ConfigError: called outside of ``fit``.

        Ranks: all, local; equal on all ranks.
        """
        if self.measure_gradients is None:
            raise ConfigError("gradient_norm() works during fit only")
        return self.measure_gradients()

    def say(self, text: str) -> None:
        """Tells the person at the terminal something, once, from rank 0's view.

        Ranks: all, local; rank 0's words are shown.
        """
        self.notes.append(text)

    def show(self, name: str, *, text: str = "", image: Any = None) -> None:
        """Hands a text or a picture to the sinks, with the next report.

        Args:
            name: what it is, such as ``"eval/sample"``.
            text: any text.
            image: an array of 8-bit values, shape ``[height, width]`` or
                ``[height, width, 3]``.

        Ranks: all, local; rank 0's is shown.
        """
        self.shown.append(Shown(name, text, image))
