"""The files of a run: its folder, its checkpoints, and the word on where it stands."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from dtrain import accelerator
from dtrain.checkpoint import format as files
from dtrain.checkpoint import one_folder, status
from dtrain.checkpoint.checking import find_together
from dtrain.checkpoint.comparison import Comparison, sharers_of
from dtrain.checkpoint.fits import Fits
from dtrain.checkpoint.format import Saved
from dtrain.checkpoint.resume import (
    EMERGENCY,
    NOT_FINITE,
    Asked,
    Decision,
    ResumeMode,
    check_mode,
    decide,
    folder_of,
)
from dtrain.checkpoint.resume import look as look_for
from dtrain.checkpoint.run_lock import RunLock
from dtrain.checkpoint.run_state import RunState
from dtrain.checkpoint.saver import Saver
from dtrain.checkpoint.status import Failures, State, Status
from dtrain.context import Progress
from dtrain.distributed import SAVING, Replicas, World, share_buffers, some_of
from dtrain.errors import CheckpointError, ConfigError, DtrainError, RunTaken

#: How long a failed run waits for the checkpoint under way, in seconds.
_LAST_CHANCE_S = 2.0

LoopState = dict[str, Any]
DataState = dict[str, Any] | None


class RunFiles:
    """All that a run leaves in ``run_dir``; without one, nothing is written.

    In order: :meth:`find` (but where the run goes on in memory), :meth:`open`, :meth:`start`,
    any number of :meth:`save`, then :meth:`finish` or :meth:`save_emergency` and
    :meth:`fail`, and :meth:`release` in any case.

    What checkpoints hold is ``run_state``'s; its ``fingerprint`` is set before :meth:`find`.

    Ranks: all, communicates; but for :meth:`fail` and :meth:`release`.
    """

    def __init__(
        self, run_dir: Path | None, world: World, run_state: RunState, replicas: Replicas
    ) -> None:
        self.saver = Saver(world)
        self._run_dir = run_dir
        self._world = world
        self._run_state = run_state
        self._replicas = replicas
        self._progress = run_state.context.progress
        self.found: Decision | None = None  # in ``run_dir``, when this process began
        self._failures = Failures()  # of earlier starts; known on rank 0
        self._comparison = Comparison(run_state, replicas)
        self._told_of_broken = False
        self._saved = -1  # the step of the newest checkpoint; known on rank 0
        self._failed: Exception | None = None  # the last save that was told of
        self._tells_end = False

    def find(self, mode: ResumeMode, own: Iterable[str] = ()) -> None:
        """Takes the run's folder, and looks what there is to go on from: once in a process.

        ``own`` are names of files in it that sinks write.
        """
        run_dir, run_state = self._run_dir, self._run_state
        check_mode(mode)
        if self.found is not None:
            self._world.comm.on_main("run lock", self._take_again)
            return
        if run_dir is None:
            if mode == "must":
                raise ConfigError("resume='must' needs a run_dir to resume from")
            self.found = Decision(None)
            return

        def take() -> None:
            one_folder.prepare(run_dir)
            self.saver.run_lock = RunLock(run_dir)
            self.saver.run_lock.take()

        def look() -> Decision:
            decision = look_for(run_dir, mode, own, found)
            if self._world.restarted and decision.before is not None:
                self._failures = status.failures_before(run_dir, decision.before)
            return decision

        self._world.comm.on_main("run lock", take)
        one_folder.check_shared(run_dir, self._world)
        found: tuple[Saved | None, list[str]] = (None, [])
        if mode != "never":
            found = find_together(folder_of(run_dir, mode), self._world)
        self.found = decision = self._world.comm.on_main("resume", look)
        run_state.fits = Fits(decision.fits)
        self._saved = -1 if decision.saved is None else decision.saved.step
        for note in decision.notes:
            run_state.context.say(note)

    def decide(self, fingerprint: Mapping[str, Any], asked: Asked) -> bool:
        """Says whether a call of ``fit`` goes on from what was found; else it is over already.

        Raises ResumeError where it may not.
        """
        found = self.found
        assert found is not None
        theirs, (goes_on, notes) = self._world.comm.on_main(
            "which fit", lambda: (asked, decide(found, fingerprint, asked))
        )
        if theirs != asked:
            raise ConfigError(f"fit was called otherwise on rank 0: {theirs} there, {asked} here")
        for note in notes:
            self._run_state.context.say(note)
        return goes_on

    @property
    def may_go_on(self) -> bool:
        """Whether the script may go on with another fit."""
        return self._run_state.fits.are_many

    @property
    def saved(self) -> Saved | None:
        """The checkpoint that was found when this process began, if any."""
        return None if self.found is None else self.found.saved

    def forget(self) -> None:
        """Has the next call look anew what is in ``run_dir``. Ranks: all, local."""
        self.found, self._run_state.fits = None, Fits()

    def _take_again(self) -> None:
        """Takes the run's folder once more, on rank 0, if it was let go of."""
        if self.saver.run_lock is not None:
            self.saver.run_lock.take_again()

    def open(self, open_sinks: Callable[[], None], *, live: bool) -> None:
        """Opens sinks; where the run goes on in memory (``live``), says that it is under way."""

        def write() -> None:
            self._take_again()
            open_sinks()
            if live:
                self._write_running()

        self._world.comm.on_main("open sinks", write)

    def open_saver(self) -> None:
        """Makes it possible to write checkpoints beside the training, if that is wanted."""
        if self._saves_beside:
            self.saver.open()

    def start(self, *, live: bool) -> None:
        """Says that the run is under way, unless that was said."""
        if self._run_dir is not None:
            self._comparison.begin()
            if self._run_state.slot is not None:
                self.saver.reserve(self._run_state.bulk())
        if not live:
            self._world.comm.on_main("status", self._write_running)

    def _write_running(self) -> None:
        """Writes that the run is under way, and the user's settings."""
        self._write_status("running")
        if self._run_dir is not None and self._run_state.config:
            text = json.dumps(self._run_state.config, indent=1) + "\n"
            (self._run_dir / "config.json").write_text(text)

    def save(self, loop_state: LoopState, data_state: DataState, *, ended: bool = False) -> None:
        """Makes a checkpoint, then deletes what need not be kept.

        Once ``fit`` has ``ended``, other weights may count.
        """
        if isinstance(self.saver.failure, RunTaken):  # on rank 0; the others are told
            raise self.saver.failure
        comm, run_state = self._world.comm, self._run_state
        if self._run_dir is None:
            run_state.context.say(
                "a checkpoint was asked for, but the Trainer has no run_dir: none is made"
            )
            comm.barrier("nothing to save")
            return
        at = replace(self._progress)  # as it is now

        def tidy() -> None:
            if run_state.slot is not None:
                # Later ones are of an earlier start, and damaged, or we had begun there.
                saved = [(s.step, s.metrics) for s in files.listed(folder) if s.step <= at.step]
                self._remove(folder, run_state.slot.prune(saved))
            self._saved = at.step
            self._write_status("running", at=at)

        self._replicas.settle(f"before the checkpoint of step {at.step}")
        content = run_state.take(loop_state, data_state, ended=ended)
        folder, then = self._run_dir / "checkpoints", tidy
        sharers, broken = self._comparison.of(content)
        if broken is not None:
            folder = self._run_dir / NOT_FINITE
            then = partial(self._keep_only, folder, at.step)
            more = (
                ". The checkpoints of finite weights stay as they are, and a new start goes on "
                "from the newest of them. NonFiniteGuard leaves such a step out, and says where "
                "it comes from."
            )
            run_state.context.say(
                f"warning: at step {at.step} weights are NaN or infinite ({some_of(broken)}): they "
                f"are kept aside, in {folder}{'' if self._told_of_broken else more}"
            )
            self._told_of_broken = True
        # The last one is waited for, and done sooner without a thread.
        wait = ended or not self._saves_beside
        self.saver.save(folder, content, then=then, sharers=sharers, wait=wait)

    def retry_failed_save(self) -> None:
        """Asks for another where a checkpoint could not be written; not where that failed, too."""
        if self.saver.failures > 1:
            self.tell_failed_save("when the next one is due")
        elif self.tell_failed_save("soon"):
            self._run_state.context.request.save("the last checkpoint could not be written")

    def tell_failed_save(self, again: str) -> bool:
        """Tells of a checkpoint that could not be written, once; returns whether it did. Local."""
        failure = self.saver.failure
        if failure is None or failure is self._failed:
            return False
        self._failed = failure
        self._run_state.context.say(
            f"warning: {failure}. Training goes on; it is tried again {again}."
        )
        return True

    def _keep_only(self, folder: Path, step: int) -> None:
        self._remove(folder, [one.step for one in files.listed(folder) if one.step != step])

    def _remove(self, folder: Path, steps: Iterable[int]) -> None:
        for step in steps:
            if trouble := files.remove(folder, step):
                self._run_state.context.say(f"warning: {trouble}. Saving goes on.")

    def save_emergency(
        self,
        loop_state: Callable[[], LoopState],
        data_state: Callable[[], DataState],
        *,
        failed_here: bool,
        error: BaseException,
    ) -> None:
        """Saves what was there before a failed step; all ranks come here from the same step.

        Nothing of that step was applied; only random streams have moved on. A note on ``error``,
        which ``fit`` is to raise, says what was saved, or why not.
        """
        if self._run_dir is None:
            return
        folder = self._run_dir / EMERGENCY
        step = self._progress.step
        comm = self._world.comm
        comm.activity.enter(SAVING)

        try:
            with comm.lockstep("saving what was before the failed step"):
                share_buffers(self._run_state.context.model, comm)
                # Whose step failed may have a broken device; others write what is there of it.
                healthy = comm.gather_objects("who failed", not failed_here)
                content = self._run_state.take(
                    loop_state(), data_state(), device_is_well=not failed_here
                )
                sharers = sharers_of(content, healthy, comm)
                then = partial(self._keep_only, folder, step)
                self.saver.save(folder, content, then=then, sharers=sharers, wait=True)
            if self.saver.failure is not None:
                raise self.saver.failure
            if self._world.is_main:
                error.add_note(
                    f"(the state before step {step} is saved in {folder}: once the cause is "
                    "mended, fit(resume='emergency') continues from it)"
                )
        except (DtrainError, RuntimeError, OSError) as another:
            error.add_note(f"(the state before the failed step could not be saved: {another})")

    def finish(
        self, reason: str, preempted: bool = False, then: Callable[[], None] = lambda: None
    ) -> tuple[Path | None, Path | None]:
        """Writes how the run ended, once no checkpoint is under way that would write otherwise.

        ``then`` is called when that is done. Returns the newest checkpoint, and the best, if any.
        """
        state: State = "preempted" if preempted else "finished"
        if self.saver.finish() is not None:
            self.tell_failed_save("when the next one is due")

        def end() -> tuple[Path | None, Path | None]:
            try:
                self._take_again()
                self._write_status(state, reason)
                self.tell_end_of_script()
            except RunTaken:
                raise
            except CheckpointError as error:  # what was trained is worth more
                self._run_state.context.say(f"warning: how the run ended is not noted: {error}")
            then()
            return self._last_and_best()

        found = self._world.comm.on_main("the end of fit", end)
        if not self._world.is_main:
            then()
        return found

    def tell_end_of_script(self) -> None:
        """Has status.json say, when Python ends, that the script has, too. Ranks: all, local."""
        lock = self.saver.run_lock
        if lock is not None and not self._tells_end:
            self._tells_end = True
            # By multiprocessing: processes that it has started call nothing of atexit.
            Finalize(None, status.script_ends, (lock, self._world), exitpriority=0)

    def last_and_best(self) -> tuple[Path | None, Path | None]:
        """Returns the newest checkpoint, and the best, as far as there are such."""
        return self._world.comm.on_main("checkpoints", self._last_and_best)

    def _last_and_best(self) -> tuple[Path | None, Path | None]:
        run_dir, by = self._run_dir, self._run_state.best_by
        if run_dir is None:
            return None, None
        every = files.listed(run_dir / "checkpoints")
        saved = [one for one in every if one.step <= self._progress.step]
        best = files.best_of(saved, *by) if by else None
        return saved[-1].path if saved else None, best.path if best else None

    def fail(self, error: BaseException, cause: BaseException | None) -> None:
        """Ends the checkpoint under way, and writes that the run failed, and why.

        ``cause`` is what ``error`` was raised for, if that is another's failure. Ranks: all,
        local; other ranks may be gone.
        """
        self.saver.leave(_LAST_CHANCE_S)
        if self._run_dir is not None and accelerator.is_lost(error):
            with suppress(OSError):
                if saved := files.listed(self._run_dir / "checkpoints"):
                    error.add_note(f"(the newest checkpoint is {saved[-1].path})")
        if not self._world.is_main or isinstance(error, RunTaken):
            return
        told = cause or error
        try:
            self._write_status("failed", f"{type(told).__name__}: {told}")
        except DtrainError as another:
            error.add_note(f"({another})")

    @contextmanager
    def in_fit(self) -> Iterator[None]:
        """A fit, after which another start of the run may begin. Ranks: all, local."""
        activity = self._world.comm.activity
        if self._world.is_main:
            activity.leave_word = lambda reason: self._write_status("failed", reason)
        try:
            yield
        finally:
            activity.leave_word = lambda reason: None
            self.saver.unreserve()
            self.saver.failure = self._failed = None  # they hold the frames that they came from
            if self.saver.run_lock is not None:
                self.saver.run_lock.release()

    @property
    def _saves_beside(self) -> bool:
        slot = self._run_state.slot
        return slot is not None and slot.background

    def _write_status(self, state: State, reason: str = "", *, at: Progress | None = None) -> None:
        lock = self.saver.run_lock
        if lock is None:
            return
        lock.check()
        at = at or self._progress
        failures = self._failures.then(at.step) if state == "failed" else self._failures
        now = Status(
            state,
            reason,
            at.step,
            at.epoch,
            self._run_state.fingerprint,
            *failures,
            requeue=(state != "finished" or self._run_state.fits.are_many) and not failures.is_loop,
            saved=self._saved,
            fit=at.phase,
            process=status.this_process(),
        )
        status.write(lock.run_dir, now)
