"""Makes checkpoints while training goes on."""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from dtrain import accelerator
from dtrain.checkpoint import writer as writing
from dtrain.checkpoint.run_lock import RunLock
from dtrain.checkpoint.writer import Content, Stage, Staged
from dtrain.distributed import SAVING, Comm, World, end_with
from dtrain.errors import CommError, RankMismatch

_LOOK_EVERY_S = 1.0
_NICE = 10


class Saver:
    """Copies what is to be saved, and has it written by a thread, so that training goes on.

    One checkpoint is written at a time: a newer one waits for it. One that could not be written
    is no error here, but a :attr:`failure`; whoever asks for the next decides what to do.

    Where ranks are threads of a test, there is no thread beside them, and each save is waited for.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._stage = Stage(world.rank)
        self._apart: Comm | None = None  # the thread's way to the other ranks' threads
        self._thread: threading.Thread | None = None
        self._leaving = threading.Lock()
        self._left = False
        self._signs = 0  # of life of the thread, that the watchdog was told of
        # Why the last checkpoint could not be written. Whoever has called :meth:`finish` knows
        # the same on all ranks; before that, a rank may know it earlier than another.
        self.failure: Exception | None = None
        self.failures = 0  # how many in a row could not be written
        self.run_lock: RunLock | None = None  # rank 0's right to write; None on the others
        #: Has rows of figures written: none is to be lost that a checkpoint is newer than.
        self.flush: Callable[[], None] = lambda: None

    def open(self) -> None:
        """Makes it possible to write beside the training. Ranks: all, communicates."""
        if self._apart is None and self._world.open_comm is not None:
            self._apart = self._world.open_comm()
            self._apart.activity.enter(SAVING)

    def reserve(self, bulk: Callable[[], Content | None]) -> None:
        """Has memory pinned for most of a checkpoint, ``bulk``, in a thread. Ranks: all, local.

        ``bulk`` is asked until it is there. On CPUs there is nothing to do beforehand.
        """
        if (beside := accelerator.of(self._world.device)) is not None:
            self._stage.reserve(bulk, self._world.size, beside)

    def unreserve(self) -> None:
        """No more is pinned from here on; what was stays. Ranks: all, local."""
        self._stage.memory.leave()

    def save(
        self,
        folder: Path,
        content: Content,
        *,
        then: Callable[[], None],
        sharers: Sequence[int],
        wait: bool = False,
    ) -> None:
        """Begins to make a checkpoint once the one before is done; ``content`` is copied.

        ``then`` is called on rank 0 once it is in place, perhaps in another thread, unless all
        ``wait`` for it. ``sharers`` divide what is equal on all ranks, and looks alike on these.
        Ranks: all, communicates.
        """
        self.finish()
        staged = self._stage.take(content, sharers)
        self.failure, self._left = None, False
        if wait or self._apart is None:
            self._write(folder, staged, self._world.comm, then)
            return
        self._apart.in_use.acquire()  # of another Trainer, too
        self._thread = threading.Thread(
            target=self._write,
            args=(folder, staged, self._apart, then),
            name="dtrain: checkpoint",
            daemon=True,  # an error elsewhere must not wait for a disk
        )
        self._thread.start()

    def finish(self) -> Exception | None:
        """Waits until the checkpoint under way is written; returns why it was not, if so.

        Ranks: all, local; the others' threads are waited for.
        """
        thread, activity = self._thread, self._world.comm.activity
        if thread is None:
            return self.failure
        before = activity.phase
        while thread.is_alive():
            if self._apart is not None and self._apart.activity.signs != self._signs:
                # The watchdog is told that the thread is at work, or waits for others.
                self._signs = self._apart.activity.signs
                activity.enter(self._apart.activity.phase)
            thread.join(_LOOK_EVERY_S)
        activity.enter(before)
        self._thread = None
        return self.failure

    def leave(self, timeout_s: float) -> None:
        """Gives the checkpoint under way so long; after that it changes no more than its own files.

        For a run that failed: other ranks may be gone.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
        with self._leaving:
            self._left = True
        if self._thread is not None and self._thread.is_alive():
            end_with("a checkpoint", self._thread, timeout_s=timeout_s)

    def _write(self, folder: Path, staged: Staged, comm: Comm, then: Callable[[], None]) -> None:
        def unless_left() -> None:
            with self._leaving:
                if not self._left:
                    then()

        if comm is self._apart:
            comm.mark_step(staged.step)  # which an error names
            with suppress(OSError):
                # This thread only, and those that it starts: where cores are scarce, a step takes
                # precedence. Whoever waits for the checkpoint has a core to give.
                os.nice(_NICE)
        try:
            main, lock = self._world.is_main, self.run_lock
            writing.write(
                folder,
                staged,
                comm,
                is_main=main,
                then=unless_left,
                before=self.flush,
                run_lock=lock,
            )
        except Exception as error:
            # What one rank raises is a RemoteError on the others, of whatever kind it was.
            if comm is self._world.comm and isinstance(error, CommError | RankMismatch):
                raise
            self.failure = error
            self.failures += 1
        else:
            self.failures = 0
        finally:
            if comm is self._apart:
                comm.in_use.release()
