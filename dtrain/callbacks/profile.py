"""A trace of chosen steps: what ran when, on the host and on the device."""

import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from dtrain.callback import Callback
from dtrain.context import Context, Step
from dtrain.distributed import current, init
from dtrain.errors import ConfigError


class Profile(Callback):
    """Records steps with ``torch.profiler``, into ``run_dir/profile/rank-...-step-....json``.

    A trace is made for each chosen rank, named by its first step, to be opened in
    https://ui.perfetto.dev or ``chrome://tracing``. Each step is an event ``step N``; they count
    from 0 and over restarts. Recording slows these steps, on all ranks, which wait for the
    slowest; leave the first few out, they are not typical. What runs between the chosen steps, such
    as an evaluation, is in the trace as well. Put it first in the list of callbacks, so that the
    others' hooks lie within the events.

    Example::

        Profile(steps=range(10, 13), ranks=(0, 1))

    Args:
        steps: ``range(start, stop)`` or ``(start, stop)``; ``stop`` is not recorded.
        ranks: which ranks record; those that the run does not have are left out.
        shapes: records the shapes of operators' inputs.
        memory: records what is allocated and freed.
        stacks: records where in the source each operator was called; slow.

    Raises:
        ConfigError: an argument is off, or the run has no folder.

    Ranks: all, local; the chosen ones write a file each.
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
        self._what: dict[str, Any] = {
            "record_shapes": shapes,
            "profile_memory": memory,
            "with_stack": stacks,
        }
        self._rank = 0
        self._recording = ExitStack()  # its end writes the trace
        self._event = ExitStack()
        self._began = False

    def on_fit_start(self, ctx: Context) -> None:
        """Says where traces will be.

        Raises:
            ConfigError: the run has no folder, or ranks are threads and several are profiled.
        """
        if ctx.run_dir is None:
            raise ConfigError("Profile writes traces: pass Trainer(run_dir='runs/...')")
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
                f"{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}, into "
                f"{ctx.run_dir / 'profile'}"
            )

    def on_step_start(self, ctx: Context, step: Step) -> None:
        """Starts recording, where it is time."""
        if step.number not in self._steps or self._rank not in self._ranks:
            return
        if not self._began:
            assert ctx.run_dir is not None
            self._began = True
            name = f"rank-{self._rank:05d}-step-{step.number:08d}.json"
            self._recording.enter_context(self._record(ctx.device, ctx.run_dir / "profile" / name))
        self._event.enter_context(torch.profiler.record_function(f"step {step.number}"))

    def on_step_end(self, ctx: Context, step: Step) -> None:
        """Ends a step's event; after the last one, writes the trace."""
        self._event.close()
        if step.number + 1 == self._steps.stop:
            with ctx.long_operation("writing a trace"):
                self._recording.close()

    def on_fit_end(self, ctx: Context) -> None:
        """Writes the trace of a run that ended early."""
        self._recording.close()

    def on_error(self, ctx: Context, error: BaseException) -> None:
        """Writes what was recorded until the error."""
        self._event.close()
        self._recording.close()

    @contextmanager
    def _record(self, device: torch.device, path: Path) -> Iterator[None]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, **self._what) as profiler:
            yield  # its end waits for the device, once
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".writing")
        profiler.export_chrome_trace(str(aside))
        os.replace(aside, path)
