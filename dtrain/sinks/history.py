"""What a run reports, to the sinks and to whoever called ``fit``; its first and last words."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch.optim import Adam, AdamW, Optimizer

from dtrain.context import Context, Outbox, Progress
from dtrain.distributed import World
from dtrain.sinks.console import Console
from dtrain.sinks.dispatcher import Dispatcher
from dtrain.sinks.facts import facts_of
from dtrain.sinks.sink import FIGURES, Report, ReportKind, Sink


@dataclass
class History:
    """Puts step, epoch and time to figures. Ranks: all, local; rank 0's reach the sinks."""

    progress: Progress
    outbox: Outbox
    dispatcher: Dispatcher
    tell: Callable[[Report], None] | None = None  # is told each report as well
    keep: int | None = None  # so many of the newest rows; all if None

    def __post_init__(self) -> None:
        self.rows: deque[dict[str, float]] = deque(maxlen=self.keep)
        self._began = time.perf_counter()

    def check(self) -> None:
        """Raises SinkError on rank 0 if a sink failed that must not. Ranks: all, local."""
        self.dispatcher.check()

    def report(
        self,
        kind: ReportKind,
        values: Mapping[str, float],
        text: str = "",
        **more: Any,
    ) -> None:
        """Sends figures or a text to the sinks, after what callbacks had to say."""
        self.say()
        for shown in self.outbox.shown:
            self._send("sample", text=shown.text, sample=shown)
        self.outbox.shown.clear()
        step, rows = self.progress.step, self.rows
        if kind == "epoch" and rows and rows[-1]["step"] == step:
            rows[-1] |= values  # it belongs to the report that ends the epoch
        elif kind in FIGURES:
            rows.append({"step": step, "epoch": self.progress.epoch, **values})
        # A copy of the values, because callbacks may keep and change theirs.
        self._send(kind, values=dict(values), text=text, **more)

    def start(
        self,
        text: str,
        config: Mapping[str, Any],
        world: World,
        hooks: Mapping[str, Sequence[str]],
    ) -> None:
        """Reports that the run begins or goes on, and what with."""
        facts = facts_of(world, hooks) if world.is_main else {}
        self.report("start", {}, text, config=config, facts=facts)

    def say(self) -> None:
        """Sends what callbacks had to say."""
        while self.outbox.notes:  # one by one: a thread that saves may add another
            self._send("message", text=self.outbox.notes.pop(0))

    @staticmethod
    def say_apart(outbox: Outbox, sinks: Iterable[Sink], *, active: bool) -> None:
        """Has consoles print what there is to say where no sink is open; or leaves it to a fit."""
        if consoles := [sink for sink in sinks if isinstance(sink, Console)]:
            notes, outbox.notes = outbox.notes, []
            for console, note in product(consoles if active else (), notes):
                console.say(note)

    def _send(self, kind: ReportKind, **what: Any) -> None:
        progress = self.progress
        report = Report(
            kind,
            progress.step,
            progress.epoch,
            seconds=time.perf_counter() - self._began,
            samples=progress.samples,
            updates=progress.updates,
            total_steps=progress.total_steps,
            steps_per_epoch=progress.steps_per_epoch,
            total_epochs=_epochs_of(progress),
            **what,
        )
        if self.tell is not None:
            self.tell(report)
        self.dispatcher.send(report)


def _epochs_of(progress: Progress) -> int | None:
    """Returns how many epochs there will have been, the last one perhaps cut short."""
    if progress.total_steps is None or not progress.steps_per_epoch:
        return None
    own = progress.total_steps - progress.first_step
    return progress.first_epoch + -(-own // progress.steps_per_epoch)


def describe_start(
    context: Context,
    world: World,
    *,
    precision: str,
    strategy: str,  # how gradients meet, in words
    batch_size: int | None,  # None for a stream
    split: Callable[[int], list[int]],
    fit: str,  # which of the run's, in words
) -> str:
    """Returns the start block: what is trained, where, and how a batch is shared out."""
    name, parameters = type(context.model).__name__, context.model.parameters()
    count = sum(p.numel() for p in parameters if p.requires_grad)
    ranks = f"{world.size} rank{'s' * (world.size > 1)}"
    where = f"{world.device.type}, {world.backend}" if world.size > 1 else world.device.type
    lines = [f"{name}: {count:,} trainable parameters, {precision}, {ranks} ({where})"]
    if batch_size is not None:
        size = context.data_size
        shares = ranks if size == world.size else f"{size} (of {world.size // size} ranks each)"
        share = -(-batch_size // size)
        sizes = split(share)
        even = size * sum(sizes) == batch_size and len(set(sizes)) == 1
        lines.append(
            f"global batch {batch_size} = {'' if even else 'up to '}{shares} x {len(sizes)} x "
            f"{max(sizes)} samples"
        )
        if batch_size < size:
            lines.append(
                "warning: the batch is smaller than the number of ranks; "
                f"{size - batch_size} of them have nothing to do in a step"
            )
        elif share < 4 and size > 1:
            lines.append(
                f"warning: a rank's share is only {share} samples; `batch_size=... * world.size` "
                "keeps ranks busy"
            )
    if world.size > 1 and strategy:
        lines.append(strategy)
    slow = [one for one in context.optimizers.values() if _fusable(one)]
    if slow:  # a user's optimizer is never altered
        lines.append(
            f"advice: {type(slow[0]).__name__}(..., fused=True) computes the same in one "
            "pass; of a small model's step that saves about a fifth"
        )
    progress = context.progress
    steps = "" if progress.total_steps is None else f"{progress.total_steps:,} steps in all"
    if progress.phase:
        steps = f"{fit} of this run, from step {progress.first_step:,}; {steps}".removesuffix("; ")
    elif fit != "fit 0":  # it has a name
        steps = f"{fit} of this run; {steps}".removesuffix("; ")
    if steps:
        lines.append(steps)
    return "\n".join(lines)


def _fusable(optimizer: Optimizer) -> bool:
    """Says whether torch has a fused kernel, quicker on the CPU, too, and was not told of it."""
    if type(optimizer) not in (Adam, AdamW) or optimizer.defaults.get("fused") is not None:
        return False
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in held)


def describe_end(context: Context, stop_reason: str, *, preempted: bool) -> str:
    """Returns the end block: why it ended, the evaluation's figures, where the files are."""
    step, epoch, metrics = context.progress.step, context.progress.epoch, context.metrics
    updates = context.progress.updates
    applied = f" ({updates:,} of them applied)" if updates != step else ""
    state = "preempted" if preempted else "finished"
    lines = [
        f"{state} after {step:,} steps{applied}, {epoch} epoch{'s' * (epoch != 1)}: {stop_reason}"
    ]
    if evaluated := [f"{k} {v:.4g}" for k, v in metrics.items() if k.startswith("eval/")]:
        lines.append("  ".join(evaluated))
    if context.run_dir is not None:
        lines.append(f"files are in {context.run_dir}")
    return "\n".join(lines)
