"""What a step asks of an accelerator beside torch's operators. Nothing else in dtrain knows CUDA's.

Each launch, event and pinned buffer costs the host some 10 microseconds, in which a small model
would have computed half of its step: so buffers and events are made once and go round, and many
small operations become one launch.
"""

import atexit
import multiprocessing
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor


class Accelerator:
    """One CUDA device. Ranks: all, local."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pinned(self, count: int, dtype: torch.dtype) -> Tensor:
        """Returns memory of the host that the device reads and writes beside the host's work."""
        return torch.zeros(count, dtype=dtype, pin_memory=True)

    def event(self) -> Any:
        """Returns a ``torch.cuda.Event``, or what stands in for one: record, query, synchronize."""
        return torch.cuda.Event()

    def on_another_stream(self) -> AbstractContextManager[object]:
        """Returns a block whose copies run beside what the current stream computes."""
        return torch.cuda.stream(_stream_of_copies(self._device))

    def wait_for(self, event: Any) -> None:
        """Has the current stream wait for an event of another one; the host does not wait."""
        torch.cuda.current_stream(self._device).wait_event(event)

    def lend(self, tensor: Tensor) -> None:
        """Says that the current stream uses a tensor that another stream made."""
        tensor.record_stream(torch.cuda.current_stream(self._device))

    def captured(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Returns what computes the same in one launch; the memory that it uses must stay."""
        return _Captured(compute, self._device)


class _Captured:
    """Runs a computation, the first time for what it sets up, then captures and replays it."""

    def __init__(self, compute: Callable[[], None], device: torch.device) -> None:
        self._compute, self._device = compute, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_warm = False

    def __call__(self) -> None:
        # Within a capture of the user's own, a replay could not be captured.
        if not self._is_warm or torch.cuda.is_current_stream_capturing():
            self._is_warm = True
            self._compute()
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        # Not `torch.cuda.graph`, which empties the allocator's cache.
        torch.cuda.synchronize(self._device)
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        beside = torch.cuda.Stream(self._device)
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            # Other threads may copy and save meanwhile, which must not be captured.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._compute()
            finally:
                graph.capture_end()
        here.wait_stream(beside)
        return graph


@cache
def of(device: torch.device) -> Accelerator | None:
    """Returns the device's accelerator; None for the CPU, whose numbers the host has at once."""
    return Accelerator(device) if device.type == "cuda" else None


_stream_of_copies = cache(torch.cuda.Stream)  # one for each device


# -- faults: what a device's errors mean -----------------------------------------------------------

# What CUDA and HIP say, by `cudaGetErrorString`, where a kernel's failure has ended the context.
_ENDED = re.compile(
    "device-side assert|illegal memory access|illegal instruction|misaligned address|unspecified "
    "launch failure|launch timed out|uncorrectable|invalid program counter|hardware stack error|"
    "operation not supported on global/shared"
)
_DOUBTFUL = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|HIP error")  # of what came before?
_NO_MEMORY = re.compile(r"out of memory|STATUS_ALLOC_FAILED|DefaultCPUAllocator")

#: The errors that said so. They hold their frames, and those what is on the device: what of it is
#: freed now (a pinned buffer, a stream's tensor) has CUDA record an event, and as that fails in a
#: destructor, the process is aborted.
_kept: list[BaseException] = []


def is_lost(error: BaseException | None) -> bool:
    """Says whether ``error`` means that this process can do nothing more on its device.

    Nothing there may be read, copied or freed then.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:  # what a script made of it counts as well
        if _says_lost(error):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _says_lost(error: BaseException) -> bool:
    words = str(error)
    # A loader's worker has a device of its own.
    if not isinstance(error, RuntimeError) or words.startswith("Caught "):
        return False
    if _ENDED.search(words):
        return True
    if not (_DOUBTFUL.search(words) and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.current_stream().query()  # of the host's: it neither waits nor copies
    except RuntimeError:
        return True
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether ``error`` means that there is no memory for what was to be computed."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    )


def is_this_ranks(error: BaseException) -> bool:
    """Says whether ``error`` is of this rank's device, whatever became of the other ranks."""
    return is_out_of_memory(error) or is_lost(error)


def give_up(error: BaseException) -> None:
    """Says in a note on ``error`` what to do, if the device is lost, and keeps what is there."""
    if error in _kept or not is_lost(error):
        return
    _kept.append(error)
    error.add_note(
        "(this process can do nothing more on its GPU, so nothing was saved from there. The kernel "
        "that failed may be of an earlier line: CUDA_LAUNCH_BLOCKING=1 has the error raised where "
        "it is; on a CPU it tells more. Often it is a label or an index out of range)"
    )


@atexit.register  # as dtrain is imported: what a script or a library registers is called before
def _leave() -> None:
    """Ends a process that has lost its device with 1, before the interpreter frees things."""
    if not _kept:
        return
    for child in multiprocessing.active_children():
        if child.daemon:  # as at any end
            child.kill()
        child.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
