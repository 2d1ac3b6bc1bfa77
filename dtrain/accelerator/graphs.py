"""Computations that are captured once, as CUDA graphs, and then replayed in one launch each."""

import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

_WAITS = "called a synchronizing CUDA operation"
_PROTOTYPE = "Synchronization debug mode"  # torch's note on the first use of it

Outputs = Sequence[Tensor | None]


class Graph:
    """A captured computation, and what it writes whenever it is replayed."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Outputs) -> None:
        self.outputs = outputs
        self.replay: Callable[[], None] = graph.replay


class Graphs:
    """Captures computations on a stream of its own. Ranks: all, local."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """A block that computes on the stream of captures, after and before all else.

        There runs what a capture may meet again: autograd's node of a parameter remembers the
        stream on which it was made, for as long as somebody holds a loss. And libraries get what
        they need on this stream before the first capture.
        """
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            here.wait_stream(self._stream)

    @contextmanager
    def noticing_waits(self) -> Iterator[list[str]]:
        """A block that gives the lines on which this thread's host code waits for the device."""
        found: list[str] = []
        me, show = threading.get_ident(), warnings.showwarning

        def keep(message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
            if _WAITS not in str(message):
                if _PROTOTYPE not in str(message):
                    show(message, category, filename, lineno, *more)
            elif threading.get_ident() == me:  # others may copy and save meanwhile
                found.append(f"{filename}:{lineno}")

        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=f".*{_WAITS}")
            warnings.showwarning = keep  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)

    def capture(self, *computations: Callable[[], Outputs]) -> list[Graph]:
        """Captures computations, which compute nothing yet, and return what they are to write.

        They share memory: each replay must follow those of the ones before it, and what one wrote
        is lost where the first is replayed again. Raises what they raise, and leaves nothing.
        """
        # Memory that was freed, but kept for what runs outside of the graph, would be taken twice.
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()
        pool = torch.cuda.graph_pool_handle()
        collects = gc.isenabled()
        gc.disable()  # what it frees may ask the device something, which ends a capture
        try:
            with self.beside():
                try:
                    return [_captured(compute, pool) for compute in computations]
                except BaseException:
                    self._recover(pool)
                    raise
        finally:
            if collects:
                gc.enable()

    def _recover(self, pool: Any) -> None:
        """Ends what a capture that failed has left open: torch closes none of it.

        The allocator would go on to gather memory for it, and the device's generator would take
        itself to be captured, and draw no more, until the next capture ends well.
        """
        device, number = self._device, self._device.index
        number = torch.cuda.current_device() if number is None else number
        with suppress(RuntimeError):  # closed already, where nothing of CUDA's has failed
            torch._C._cuda_endAllocateToPool(number, pool)
        with suppress(RuntimeError):
            _captured(lambda: [torch.zeros((), device=device)], torch.cuda.graph_pool_handle())


def _captured(compute: Callable[[], Outputs], pool: Any) -> Graph:
    graph = torch.cuda.CUDAGraph()
    # Other threads may copy and save meanwhile, which must not be captured.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        outputs = compute()
    except BaseException:
        with suppress(RuntimeError):  # that it was broken off: the first error counts
            graph.capture_end()
        raise
    graph.capture_end()
    return Graph(graph, outputs)
