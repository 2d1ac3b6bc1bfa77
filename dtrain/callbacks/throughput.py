"""How fast the training is, and where a step's time goes."""

import resource
import sys
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dtrain import accelerator
from dtrain.callback import Callback
from dtrain.callbacks.argument_checks import check_positive
from dtrain.context import Context, Step
from dtrain.distributed import current, init
from dtrain.errors import ConfigError

PHASES = ("data", "forward", "backward", "optimizer")
_STEP_S = "throughput/step_s"
_TIMED = 10  # of an accelerator's steps, one in so many is timed there, and read so late that
_LATE = 2  # the host has waited for a later one already


class Throughput(Callback):
    """Logs speed, memory and the shares of a step's time, over the steps since the last report.

    ========================== ===================================================================
    ``samples_per_s``          samples of all ranks in the time of the steps
    ``tokens_per_s``           the same, where ``tokens_per_sample`` is given
    ``step_s``                 a step's mean length
    ``{phase}_share``          of that: ``data`` (waiting for a batch), ``forward``, ``backward``
                               (with waiting for other ranks), ``optimizer`` (with clipping)
    ``data_max_s``             the longest that any rank's host waited for its data in a step
    ``memory_gib``             the peak on any rank: CUDA's allocator, or the process on CPUs
    ``tflops_per_s``, ``mfu``  of a device, where FLOPs and ``peak_flops`` are known
    ========================== ===================================================================

    All names begin with ``throughput/``. What lies between steps (evaluation, saving, reports)
    counts as no step's time. Hooks of other callbacks count to the phase in which they run.
    ``mfu`` is ``flops_per_sample * samples/s / (devices * peak_flops)`` (Chowdhery et al., "PaLM",
    2022, appendix B).

    Nothing waits for the device. On CUDA the shares are those of the device's own time, in one step
    of ten (the first is step 1): of what it computes, and of waiting for the host in between. All
    other times are the host's, which runs ahead by a step: right on average.
    Example: ``Throughput(tokens_per_sample=1024, count_flops=True, peak_flops=989e12)``.

    Args:
        tokens_per_sample: tokens in a sample.
        flops_per_sample: floating-point operations that training on one sample takes, forward
            and backward, without what activation checkpointing computes again.
        count_flops: counts those of the first forward, and takes three times as many: backward
            needs two products for each of forward's. That step is left out of the figures.
        peak_flops: what a device can do in a second, by its maker.
    """

    asks_for_gradients = True  # it never looks

    def __init__(
        self,
        *,
        tokens_per_sample: float | None = None,
        flops_per_sample: float | None = None,
        count_flops: bool = False,
        peak_flops: float | None = None,
    ) -> None:
        check_positive("Throughput", tokens_per_sample=tokens_per_sample, peak_flops=peak_flops)
        check_positive("Throughput", flops_per_sample=flops_per_sample)
        if count_flops and flops_per_sample is not None:
            raise ConfigError("Throughput: give flops_per_sample or count_flops, not both")
        if peak_flops is not None and not count_flops and flops_per_sample is None:
            raise ConfigError("Throughput(peak_flops=...) needs flops_per_sample or count_flops")
        self._tokens_per_sample = tokens_per_sample
        self._flops_per_sample = flops_per_sample
        self._peak_flops = peak_flops
        self._to_count = count_flops
        self._counting = ExitStack()
        self._counted_in = -1
        self._sums = dict.fromkeys(PHASES, 0.0)  # seconds since the last report
        self._samples = 0
        self._on_device: _DeviceClock | None = None

    def on_fit_start(self, ctx: Context) -> None:
        self._devices = (current() or init()).size
        device = accelerator.of(ctx.device)
        self._on_device = None if device is None else _DeviceClock(device)

    def on_step_start(self, ctx: Context, step: Step) -> None:
        if not ctx.is_logged(_STEP_S):  # what was logged has been reported
            self._sums = dict.fromkeys(PHASES, 0.0)
            self._samples = 0
        self._step = dict.fromkeys(PHASES, 0.0)  # seconds
        self._samples_before = ctx.progress.samples
        self._since = perf_counter()
        if self._on_device is not None:
            self._on_device.begin(step, reported=not ctx.is_logged(_STEP_S))

    def on_batch(self, ctx: Context, step: Step) -> None:
        self._counting.close()
        self._end("data")
        if self._to_count:
            self._counted_in = step.number
            self._counter = _FlopCounter()  # type: ignore[no-untyped-call]
            self._counting.enter_context(self._counter)

    def on_loss(self, ctx: Context, step: Step) -> None:
        self._counting.close()
        self._end("forward")
        if self._to_count:
            self._to_count = False
            flops = self._counter.flops
            self._flops_per_sample = 3 * flops / step.samples if flops else None
            if not flops:
                ctx.say("Throughput: no FLOPs could be counted; give flops_per_sample instead")
        if step.loss is not None and step.micro + 1 != step.micros:
            step.loss.mean.register_hook(self._watch_backward)  # the next batch comes after it

    def on_grads_ready(self, ctx: Context, step: Step) -> None:
        self._counting.close()  # a micro-batch that was skipped has no on_loss
        self._end("backward")

    def on_step_end(self, ctx: Context, step: Step) -> None:
        self._end("optimizer")
        self._counting.close()
        of_phases = self._sums
        if self._on_device is not None:
            of_phases = self._on_device.end(counts=self._counted_in != step.number)
        if self._counted_in == step.number:
            return
        if not self._samples:
            ctx.log("throughput/memory_gib", _peak_bytes(ctx.device) / 2**30, "max")
        self._samples += ctx.progress.samples - self._samples_before
        for phase in PHASES:
            self._sums[phase] += self._step[phase]
        seconds = sum(self._sums.values())
        samples_per_s = self._samples / seconds
        ctx.log("throughput/samples_per_s", samples_per_s, "last")
        if self._tokens_per_sample is not None:
            ctx.log("throughput/tokens_per_s", samples_per_s * self._tokens_per_sample, "last")
        ctx.log(_STEP_S, sum(self._step.values()))
        whole = sum(of_phases.values())
        for phase in PHASES if whole else ():
            ctx.log(f"throughput/{phase}_share", of_phases[phase] / whole, "last")
        ctx.log("throughput/data_max_s", self._step["data"], "max")
        if self._flops_per_sample is not None:
            flops_per_s = self._flops_per_sample * samples_per_s / self._devices
            ctx.log("throughput/tflops_per_s", flops_per_s / 1e12, "last")
            if self._peak_flops is not None:
                ctx.log("throughput/mfu", flops_per_s / self._peak_flops, "last")

    def on_error(self, ctx: Context, error: BaseException) -> None:
        self._counting.close()

    def _end(self, phase: str) -> None:
        now = perf_counter()
        self._step[phase] += now - self._since
        self._since = now
        if self._on_device is not None:
            self._on_device.mark(phase)

    def _watch_backward(self, grad: Tensor) -> None:
        # Backward begins here; the engine calls back when it is done, as it does for DDP.
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._end("backward"))


class _DeviceClock:
    """Times the phases of some steps where they are computed, with events that go round."""

    def __init__(self, device: accelerator.Accelerator) -> None:
        self._device = device
        self._events: list[Any] = []
        self._phases: list[str] = []  # that end with each event but the first, of the timed step
        self._runs = False  # a step is being timed
        self._age = 0  # steps that ended since
        self._stale = True  # the sums are of steps that were reported
        self._sums = dict.fromkeys(PHASES, 0.0)  # milliseconds

    def begin(self, step: Step, *, reported: bool) -> None:
        self._stale |= reported
        self._runs = step.number % _TIMED == 1
        if self._runs:
            self._phases, self._age = [], 0
            self._record(0)

    def mark(self, phase: str) -> None:
        if self._runs:
            self._phases.append(phase)
            self._record(len(self._phases))

    def _record(self, number: int) -> None:
        if number == len(self._events):
            self._events.append(self._device.event(timed=True))
        self._events[number].record()

    def end(self, *, counts: bool) -> dict[str, float]:
        """Ends a step, which counts or not; returns the newest sums of what was timed."""
        if self._runs and not counts:
            self._phases = []
        self._runs = False
        if self._phases and self._age == _LATE:
            if self._stale:
                self._sums, self._stale = dict.fromkeys(PHASES, 0.0), False
            for number, phase in enumerate(self._phases):
                self._events[number + 1].synchronize()  # it is there already
                since, until = self._events[number : number + 2]
                self._sums[phase] += since.elapsed_time(until)
            self._phases = []
        self._age += 1
        return self._sums


class _FlopCounter(TorchDispatchMode):
    """Counts FLOPs; torch's FlopCounterMode would make torch.compile give up on what it sees."""

    flops = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
