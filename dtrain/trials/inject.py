"""Disturbs a rank's process: in a hook, or between two writes of a checkpoint."""

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

from dtrain.callback import Callback
from dtrain.context import Context, Step
from dtrain.distributed import World
from dtrain.trials.drill_plan import Disturbance
from dtrain.trials.records import EventLog


class Injector(Callback):
    """Last in the list: when it disturbs, all other callbacks have done what they do.

    The log is told just before. Ranks leave the numbers of their processes in ``folder``.

    Ranks: all, local.
    """

    name = "drill: injector"

    def __init__(
        self, disturbance: Disturbance | None, log: EventLog, folder: Path, world: World
    ) -> None:
        mine = disturbance is not None and disturbance.rank == world.rank
        self._due = disturbance if mine else None
        self._log = log
        self._world = world
        self._processes = [folder / f"process-{rank}.txt" for rank in range(world.size)]
        self._processes[world.rank].write_text(str(os.getpid()))

    def on_grads_ready(self, ctx: Context, step: Step) -> None:
        """Disturbs before the update, if it is to."""
        self._disturb_in("on_grads_ready", step.number, "before the update")

    def on_step_end(self, ctx: Context, step: Step) -> None:
        """Disturbs after the update, if it is to."""
        self._disturb_in("on_step_end", step.number + 1, "after the update")

    def _disturb_in(self, hook: str, step: int, moment: str) -> None:
        due, rank = self._due, self._world.rank
        if due is None or due.in_save or (hook, step) != (due.hook, due.step):
            return
        if due.kind == "preempt":
            self._log.tell("disturbed", what=f"SIGTERM to rank {rank}")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        which = "all ranks" if due.kind == "kill all" else f"rank {rank}"
        self._log.tell("disturbed", what=f"kill -9 of {which}, {moment}")
        for other, process in enumerate(self._processes):
            if due.kind == "kill all" and other != rank:
                # In this step all of them are here: it took a reduction to come to it.
                os.kill(int(process.read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def on_save(self, ctx: Context) -> None:
        """Lays the disturbance into the making of this checkpoint, if it is to come there."""
        due = self._due
        if due is not None and due.in_save and ctx.progress.step == due.step:
            vars(os)["fsync"] = self._counted(os.fsync, due)

    def _counted(self, fsync: Callable[[int], None], due: Disturbance) -> Callable[[int], None]:
        """Returns an ``fsync`` of which one call is the last.

        Each file of a checkpoint goes down to the disk, then the folder that they are in, and,
        once that has its name, the one above.
        """
        places = itertools.count()
        renaming = due.kind == "kill renaming"

        def counted(handle: int) -> None:
            fsync(handle)
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            of_checkpoint = "checkpoints" in (path.name, path.parent.name, path.parent.parent.name)
            if not of_checkpoint or path.is_dir() != renaming or next(places) < due.place:
                return
            if renaming:
                where = "just after" if path.name == "checkpoints" else "just before"
                what = f"{where} it was renamed into place"
            else:
                os.truncate(path, path.stat().st_size // 2)
                what = f"half of {path.name} written"
            self._log.tell("disturbed", what=f"kill -9 within a save, {what}")
            os.kill(os.getpid(), signal.SIGKILL)

        return counted
