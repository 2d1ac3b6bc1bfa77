"""What every hook gets first."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.context.optimizers import Key, parts_of
from dtrain.context.outbox import Logged, Outbox, Reduce, Request, Shown, check_name
from dtrain.context.step import Loss, Number, Progress
from dtrain.distributed import Comm, World
from dtrain.errors import ConfigError


class _Engine(Protocol):  # what computes for hooks, behind the methods of the same names
    def loss_of(self, ctx: "Context", batch: Any) -> Loss: ...

    def gradients(self, optimizer: Optimizer | None) -> list[Tensor]: ...

    def gradient_norm(self) -> Tensor: ...

    def gradient_check(self) -> Tensor: ...

    def clip_gradient_norm(self, max_norm: float) -> Tensor: ...


@dataclass(eq=False)
class Context:
    """What every hook gets first.

    Attributes:
        model: the user's own module, never wrapped.
        optimizer: the user's own optimizer; of several, one that has the groups of all.
        progress: how far the run is.
        comm: verbs between ranks; all ranks must call them.
        request: ask to stop, skip or save; never communicates.
        rng: a generator of this rank's own.
        shared_rng: a generator that is equal on all ranks.
        device: where this rank computes.
        run_dir: where the run keeps its files, or None.
        has_eval: whether `fit` was given an eval_set.
        in_fit: whether a hook is part of a training: False in those of ``Trainer.evaluate``.
        loss_scaled: whether the precision scales the loss; then a gradient may overflow.
        reads_at_once: whether a tensor's number can be read without waiting: False on a GPU.
        sharded: whether each rank holds rows of parameters and gradients only (strategy="fsdp").
        metrics: the newest agreed metrics, equal on all ranks. From an epoch's end to the next
            report, ``train/...`` are means of that epoch; they stay there as ``epoch/...``.

    Ranks: all, local where a method does not say otherwise.
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
    in_fit: bool = False
    loss_scaled: bool = False
    reads_at_once: bool = True
    sharded: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    _made_at: dict[str, int] = field(default_factory=dict, repr=False)  # the step of each metric
    _taken: int = field(default=0, repr=False)  # how often parameters were taken to be trained
    _outbox: Outbox = field(default_factory=Outbox, repr=False)
    #: Whose samples this rank has, of how many.
    _seat: World | None = field(default=None, repr=False)
    #: Weak: the engine holds this context.
    _engine: Callable[[], _Engine | None] = field(default=lambda: None, repr=False)

    @property
    def data_rank(self) -> int:
        """Whose samples this rank has, of ``data_size``: its own, or those of several ranks.

        Several compute each batch together where layers are sliced (tensor parallel).
        """
        return self._seat.rank if self._seat is not None else 0

    @property
    def data_size(self) -> int:
        """Among how many samples are shared out; see ``data_rank``."""
        return self._seat.size if self._seat is not None else 1

    @property
    def counts(self) -> bool:
        """False on a rank whose samples another one counts already; see ``data_rank``."""
        return self._seat is None or self._seat.counts

    @property
    def optimizers(self) -> dict[Key, Optimizer]:
        """The user's own optimizers, by name, or by place in a list; the only one is 0."""
        return parts_of(self.optimizer)

    def optimizer_of(self, key: Key | None) -> Optimizer:
        """Returns the optimizer of that name or place; for None, ``ctx.optimizer``.

        Raises:
            ConfigError: there is none.
        """
        if key is None:
            return self.optimizer
        every = self.optimizers
        if key not in every:
            known = ", ".join(map(repr, every))
            raise ConfigError(f"optimizer={key!r}: there is no such optimizer; there are {known}")
        return every[key]

    def log(self, name: str, value: Number, reduce: Reduce = "mean") -> None:
        """Keeps a value; all values are reported as one number at the next sync point.

        The value is not read here, so a CUDA tensor costs no sync.

        Args:
            name: what to report it as; the same name always has the same ``reduce``, on all ranks.
            value: a number or a 0-dim tensor.
            reduce: over calls and ranks: their ``"mean"``, ``"sum"`` or ``"max"`` (NaN wins);
                ``"last"`` is the mean over ranks of each rank's last value.

        Raises:
            ConfigError: ``reduce`` is none of these, or another than before; or the name is one of
                dtrain's own (``lr``, ``train/loss``, ...) or an evaluation's (``eval/...``).
        """
        if reduce not in get_args(Reduce):
            raise ConfigError(f"log({name!r}, reduce={reduce!r}): one of {get_args(Reduce)}")
        logged = self._outbox.logged.get(name)
        if logged is None:
            if name.startswith("eval/"):
                raise ConfigError(
                    f"log({name!r}): what is logged goes into the next report of the training. Add "
                    f"it to the evaluation's own figures: metrics[{name!r}] = ... in on_eval_end"
                )
            check_name(name)
            logged = self._outbox.logged[name] = Logged(reduce)
        if logged.reduce != reduce:
            raise ConfigError(
                f"log({name!r}, reduce={reduce!r}): it was logged with {logged.reduce!r} before"
            )
        if isinstance(value, Tensor):
            # A copy: its owner may go on to write into it, as into a parameter or a running mean.
            value = (value.detach() if value.requires_grad else value).clone()
        logged.values.append(value)

    def _take(self, figures: dict[str, float]) -> None:
        """Makes figures of this step the newest ones; they are equal on all ranks."""
        self.metrics |= figures
        self._made_at |= dict.fromkeys(figures, self.progress.step)

    def _figures_of_this_step(self) -> dict[str, float]:
        """Returns the figures that belong to the weights as they are now."""
        now, made_at = self.progress.step, self._made_at
        return {name: v for name, v in self.metrics.items() if made_at.get(name) == now}

    def is_logged(self, name: str) -> bool:
        """Says whether a value of that name waits for the next report."""
        return name in self._outbox.logged

    def say(self, text: str) -> None:
        """Tells the person at the terminal something, once; rank 0's words are shown."""
        self._outbox.notes.append(text)

    def show(self, name: str, *, text: str = "", image: Any = None) -> None:
        """Hands a text or a picture to the sinks, with the next report; rank 0's is shown.

        Args:
            name: what it is, such as ``"eval/sample"``.
            text: any text.
            image: an array of 8-bit values, shape ``[height, width]`` or ``[height, width, 3]``.
        """
        self._outbox.shown.append(Shown(name, text, image))

    def heartbeat(self) -> None:
        """Says that this rank is still at work, where a hook or a loss function takes long.

        One that says nothing is taken for stuck after ``Trainer(hang_after_s=...)`` seconds, or
        ten times the slowest recent step.
        """
        self.comm.activity.enter(self.comm.activity.phase)

    def long_operation(self, what: str) -> AbstractContextManager[None]:
        """Returns a block in which one call may take minutes; ``what`` is for messages.

        Example::

            with ctx.long_operation("writing the trace"):
                profiler.export_chrome_trace(path)
        """
        return self.comm.activity.long_operation(what)

    def loss_of(self, batch: Any) -> Loss:
        """Runs the loss function once more, as training would, for debugging.

        The model's parameters get no gradient by this alone, and what it logs is forgotten. Where
        they are sharded, all ranks call it, those without a batch with None, for a loss of weight
        0; what is returned has no graph.

        Ranks: all, local, unless the loss function communicates, or ``ctx.sharded``.
        """
        outbox, logged = self._outbox, self._outbox.logged
        outbox.logged = {}
        try:
            return (self._engine() or _too_early("loss_of")).loss_of(self, batch)
        finally:
            outbox.logged = logged

    def gradients(self, optimizer: Key | None = None) -> list[Tensor]:
        """In ``on_grads_ready``: tensors that hold all gradients, and otherwise zeros only.

        For what is done to all of them alike, such as a norm: there may be fewer of them than of
        parameters. What is done to them in place is done to the gradients. Equal on all ranks; but
        of this rank's own rows, where ``ctx.sharded``.

        Args:
            optimizer: which of several optimizers', by its name or place; all if None.

        Raises:
            ConfigError: called outside of ``fit``; or there is no such optimizer.
        """
        which = None if optimizer is None else self.optimizer_of(optimizer)
        return (self._engine() or _too_early("gradients")).gradients(which)

    def gradient_norm(self) -> Tensor:
        """In ``on_grads_ready``: the joint Euclidean norm of all gradients; equal on all ranks.

        Raises:
            ConfigError: called outside of ``fit``.
        """
        return (self._engine() or _too_early("gradient_norm")).gradient_norm()

    def gradient_check(self) -> Tensor:
        """In ``on_grads_ready``: a 0-dim tensor that is finite if the norm of the gradients is.

        Equal on all ranks, and cheaper than the norm, where nobody has asked for that.

        Raises:
            ConfigError: called outside of ``fit``.
        """
        return (self._engine() or _too_early("gradient_check")).gradient_check()

    def clip_gradient_norm(self, max_norm: float) -> Tensor:
        """In ``on_grads_ready``: bounds the joint Euclidean norm of all gradients.

        Returns what it was, 0-dim; nothing is waited for. Where no callback looks at the gradients
        after it, a fused optimizer may clip on its way.

        Raises:
            ConfigError: called outside of ``fit``.
        """
        engine = self._engine() or _too_early("clip_gradient_norm")
        return engine.clip_gradient_norm(max_norm)


def _too_early(what: str) -> NoReturn:
    raise ConfigError(f"{what}() works once the Trainer is made")
