"""Memory of the host that checkpoints are copied into. It is kept: to get it takes longer."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from dtrain.accelerator import Accelerator
from dtrain.checkpoint import disk
from dtrain.distributed import is_sharded

#: While an accelerator's driver pins a block, it launches nothing: blocks are small.
BLOCK_BYTES = 8 * 2**20
#: Where a file may begin in a block, whatever dtype its first tensor has.
_ALIGNED = 64
_LOOK_EVERY_S = 0.05

Tensors = Mapping[str, Tensor]


class HostMemory:
    """Blocks of memory, in which tensors lie as they do in files; any may reach over several.

    With an accelerator they are pinned: it copies into them beside the host, and a thread can get
    them while training runs.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._places: dict[tuple[str, str], int] = {}  # of tensors, by file and name
        self._growing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._left = threading.Event()

    def copy(
        self, files: Mapping[str, Tensors], beside: Accelerator | None
    ) -> dict[str, list[memoryview]]:
        """Copies tensors, by the file that is to hold them; returns what to write into each.

        What was returned before is overwritten. With an accelerator, copies may be under way.
        Sharded tensors get a place, into which :meth:`put` copies them.
        """
        while self._grow(bytes_of(files), beside):
            pass
        parts, at = {}, 0
        for file, tensors in files.items():
            names, begin = disk.order(tensors), at
            for name in names:
                self._places[file, name], tensor = at, tensors[name]
                at = at + tensor.nbytes if is_sharded(tensor) else self._copy_one(tensor, at)
            parts[file] = [memoryview(disk.header(tensors, names)), *self._between(begin, at)]
            at = _aligned(at)
        return parts

    def put(self, file: str, name: str, tensor: Tensor) -> None:
        """Copies a tensor into its place."""
        self._copy_one(tensor, self._places[file, name])

    def reserve(self, wanted: Callable[[], int | None], beside: Accelerator) -> None:
        """Gets as many bytes as are ``wanted`` in a thread, once that is known."""
        self._left = threading.Event()
        self._thread = threading.Thread(
            target=self._reserve,
            args=(wanted, beside, self._left),
            name="dtrain: memory of checkpoints",
            daemon=True,
        )
        self._thread.start()

    def leave(self) -> None:
        """Has the thread end, and waits for it: at most for one block."""
        self._left.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _reserve(
        self, wanted: Callable[[], int | None], beside: Accelerator, left: threading.Event
    ) -> None:
        with suppress(Exception):  # a save gets what is missing itself, and says why it cannot
            while (size := wanted()) is None:
                if left.wait(_LOOK_EVERY_S):
                    return
            began = time.monotonic()
            while not left.is_set() and self._grow(size, beside):
                left.wait(time.monotonic() - began)  # as long as it took: training has its turn
                began = time.monotonic()

    def _grow(self, size: int, beside: Accelerator | None) -> bool:
        """Gets one more block, if there are less than ``size`` bytes."""
        with self._growing:
            if len(self._blocks) * BLOCK_BYTES >= size:
                return False
            self._blocks.append(
                beside.pinned(BLOCK_BYTES, torch.uint8)
                if beside
                else torch.empty(BLOCK_BYTES, dtype=torch.uint8)
            )
            return True

    def _copy_one(self, tensor: Tensor, at: int) -> int:
        """Copies a tensor to this place, in as many turns as there are blocks; returns its end."""
        flat, size = tensor.detach().reshape(-1), tensor.element_size()
        while flat.numel():
            number, begin = divmod(at, BLOCK_BYTES)
            count = min(flat.numel(), (BLOCK_BYTES - begin) // size)
            place = self._blocks[number][begin : begin + count * size].view(flat.dtype)
            place.copy_(flat[:count], non_blocking=True)
            flat, at = flat[count:], at + count * size
        return at

    def _between(self, begin: int, end: int) -> list[memoryview]:
        parts = []
        while begin < end:
            number, first = divmod(begin, BLOCK_BYTES)
            last = min(BLOCK_BYTES, first + end - begin)
            parts.append(self._blocks[number].numpy().data[first:last])
            begin += last - first
        return parts


def bytes_of(files: Mapping[str, Tensors]) -> int:
    """Returns how much memory copies of these take."""
    return sum(_aligned(sum(one.nbytes for one in held.values())) for held in files.values())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
