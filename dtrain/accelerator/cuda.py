"""What a step asks of a CUDA device beside torch's operators.

Each launch, event and pinned buffer costs the host some 10 microseconds, in which a small model
would have computed half of its step: so buffers and events are made once and go round, and many
small operations become one launch.
"""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dtrain.accelerator.graphs import Graphs


class Accelerator:
    """One CUDA device. Ranks: all, local."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        """Returns memory of the host that the device reads and writes beside the host's work."""
        return torch.zeros(count, dtype=dtype, device="cpu", pin_memory=True)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Says whether it is such memory."""
        return tensor.is_pinned()

    def holds(self, tensor: Tensor) -> bool:
        """Says whether it lies on the device."""
        if not tensor.is_cuda:
            return False
        number = self._device.index
        return tensor.get_device() == (torch.cuda.current_device() if number is None else number)

    def copied(self, tensor: Tensor) -> Tensor:
        """Returns a copy on the device; the host does not wait for one of pinned memory."""
        return tensor.to(self._device, non_blocking=True)

    def event(self, *, timed: bool = False) -> Any:
        """Returns a ``torch.cuda.Event``, or what stands in for one: record, query, synchronize.

        A timed one tells ``elapsed_time(later_one)`` in milliseconds.
        """
        return torch.cuda.Event(enable_timing=timed)

    def on_another_stream(self) -> AbstractContextManager[object]:
        """Returns a block whose copies run beside what the current stream computes."""
        return torch.cuda.stream(_stream_of_copies(self._device))

    def wait_for(self, event: Any) -> None:
        """Has the current stream wait for an event of another one; the host does not wait."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def lend(self, tensor: Tensor) -> None:
        """Says that the current stream uses a tensor that another stream made."""
        tensor.record_stream(torch.cuda.current_stream(self._device))

    def captured(self, compute: Callable[..., None]) -> Callable[..., None]:
        """Returns what computes the same in one launch; the memory that it uses must stay.

        It is to be called with the same arguments each time. Hand it a function, not a method of
        who keeps what is returned: that would be a cycle, and what it holds on the device would
        wait for the garbage collector.
        """
        return _Captured(compute, self._device)

    def graphs(self) -> Graphs:
        """Returns what captures whole micro-steps, on a stream of its own."""
        return Graphs(self._device)


class _Captured:
    """Runs a computation, the first time for what it sets up, then captures and replays it."""

    def __init__(self, compute: Callable[..., None], device: torch.device) -> None:
        self._compute, self._device = compute, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_warm = False

    def __call__(self, *args: Any) -> None:
        # Within a capture of the user's own, a replay could not be captured.
        if not self._is_warm or torch.cuda.is_current_stream_capturing():
            self._is_warm = True
            self._compute(*args)
            return
        if self._graph is None:
            self._graph = self._capture(*args)
        self._graph.replay()

    def _capture(self, *args: Any) -> torch.cuda.CUDAGraph:
        # Not `torch.cuda.graph`, which empties the allocator's cache.
        torch.cuda.synchronize(self._device)
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        beside = torch.cuda.Stream(self._device)
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            # Other threads may copy and save meanwhile, which must not be captured.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._compute(*args)
            finally:
                graph.capture_end()
        here.wait_stream(beside)
        return graph


@cache
def of(device: torch.device) -> Accelerator | None:
    """Returns the device's accelerator; None for the CPU, whose numbers the host has at once."""
    return Accelerator(device) if device.type == "cuda" else None


def let_go() -> None:
    """Gives back what torch keeps of a device for later, as after a failure for want of memory."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


_stream_of_copies = cache(torch.cuda.Stream)  # one for each device
