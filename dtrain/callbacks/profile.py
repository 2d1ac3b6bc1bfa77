"""A trace of chosen steps: what ran when, on the host and on the device."""

import os
from collections.abc import Collection
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from dtrain.accelerator import is_lost
from dtrain.callback import Callback
from dtrain.context import Context, Step
from dtrain.distributed import current, init
from dtrain.errors import ConfigError


class Profile(Callback):
    """Records steps with ``torch.profiler``, into ``run_dir/profile/rank-...-step-....json``.

    Each chosen rank makes a trace, named by its first step, to be opened in
    https://ui.perfetto.dev or ``chrome://tracing``. Recording slows these steps, on all ranks,
    which wait for the slowest. What runs between them, such as an evaluation, is in the trace as
    well. Put it first in the list of callbacks, so that the others' hooks lie within the events
    ``step N``. It needs ``Trainer(run_dir=...)``.
    Example: ``Profile(steps=range(10, 13), ranks=(0, 1))``.

    Args:
        steps: ``range(start, stop)`` or ``(start, stop)``; ``stop`` is not recorded. They count
            from 0 and over restarts; leave the first few out, they are not typical.
        ranks: which ranks record; those that the run does not have are left out.
        shapes: records the shapes of operators' inputs.
        memory: records what is allocated and freed.
        stacks: records where in the source each operator was called; slow.
    """

    def __init__(
        self,
        steps: range | tuple[int, int],
        *,
        ranks: Collection[int] = (0,),
        shapes: bool = False,
        memory: bool = False,
        stacks: bool = False,
    ) -> None:
        if not isinstance(steps, range):
            if not (isinstance(steps, tuple) and len(steps) == 2):
                raise ConfigError(f"Profile(steps={steps!r}): give range(start, stop)")
            steps = range(*steps)
        if steps.step != 1 or steps.start < 0 or not steps:
            raise ConfigError(
                f"Profile(steps={steps!r}): must be at least one step, from 0 up, without gaps"
            )
        if not ranks or min(ranks) < 0:
            raise ConfigError(f"Profile(ranks={ranks!r}): must be at least one rank, from 0 up")
        self._steps = steps
        self._ranks = sorted(set(ranks))
        self._profiler = partial(
            torch.profiler.profile, record_shapes=shapes, profile_memory=memory, with_stack=stacks
        )
        self._recording = ExitStack()  # its end waits for the device, once, and writes the trace
        self._event = ExitStack()

    def on_fit_start(self, ctx: Context) -> None:
        if ctx.run_dir is None:
            raise ConfigError("Profile writes traces: pass Trainer(run_dir='runs/...')")
        self._folder = ctx.run_dir / "profile"
        world = current() or init()
        self._rank, self._began = world.rank, False
        ranks = [rank for rank in self._ranks if rank < world.size]
        if world.launcher == "threads" and len(ranks) > 1:
            # A process has one profiler, which dies of two threads that use it.
            raise ConfigError(
                f"Profile(ranks={ranks}): ranks are threads of one process here, of which torch "
                "can profile one; use dtrain.testing.run_processes"
            )
        if not ranks:
            ctx.say(
                f"Profile: there is no rank {self._ranks[0]} among {world.size}; "
                "nothing is profiled"
            )
        elif ctx.progress.step < self._steps.stop:
            ctx.say(
                f"profiling steps {self._steps.start} to {self._steps.stop - 1} on rank"
                f"{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}, into {self._folder}"
            )

    def on_step_start(self, ctx: Context, step: Step) -> None:
        if step.number not in self._steps or self._rank not in self._ranks:
            return
        if not self._began:
            self._began = True
            path = self._folder / f"rank-{self._rank:05d}-step-{step.number:08d}.json"
            kind = torch.profiler.ProfilerActivity
            activities = [kind.CPU, kind.CUDA] if ctx.device.type == "cuda" else [kind.CPU]
            record = self._profiler(activities=activities, on_trace_ready=partial(_write, path))
            self._recording.enter_context(record)
        self._event.enter_context(torch.profiler.record_function(f"step {step.number}"))

    def on_step_end(self, ctx: Context, step: Step) -> None:
        self._event.close()
        if step.number + 1 == self._steps.stop:
            with ctx.long_operation("writing a trace"):
                self._recording.close()

    def on_fit_end(self, ctx: Context) -> None:
        self._event.close()
        self._recording.close()  # of a run that ended early

    def on_error(self, ctx: Context, error: BaseException) -> None:
        if not is_lost(error):  # else its end would wait for the device
            self.on_fit_end(ctx)


def _write(path: Path, profiler: torch.profiler.profile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".writing")
    profiler.export_chrome_trace(str(aside))
    os.replace(aside, path)
