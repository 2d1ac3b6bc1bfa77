"""What a device's errors mean, and how a process ends that has lost its device."""

import multiprocessing
import os
import re
import sys

import torch

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


def leave() -> None:
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
