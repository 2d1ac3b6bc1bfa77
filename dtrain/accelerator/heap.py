"""Memory of the host that C's heap keeps once it was freed."""

import ctypes
from contextlib import suppress


def give_back_heap() -> None:
    """Gives it back to the system, where the C library can (glibc).

    What is small, and allocated in the place of what was large, keeps the rest of that from being
    used again: while large tensors come and go, the heap grows by their sum.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
