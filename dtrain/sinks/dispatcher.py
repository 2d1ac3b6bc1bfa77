"""Hands reports to sinks, each in a thread of its own, so that none can hold up the training.

A sink may be slow, hang or fail: the others and the training go on, and stderr says what happened.
"""

import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dtrain.errors import ConfigError, SinkError, locate
from dtrain.sinks.sink import Report, Sink

_PATIENCE_S = 30.0  # how long a sink may take to open before somebody is told


class Dispatcher:
    """Hands each report to every sink, in order; never blocks, and never raises once it is open.

    Before :meth:`open`, after :meth:`close` and where ``active`` is False (on all ranks but 0),
    :meth:`send` does nothing: in error paths, too, callers need no branch. All check ``sinks``.
    """

    def __init__(
        self,
        sinks: Iterable[Sink],
        run_dir: Path | None,
        *,
        active: bool = True,
        capacity: int = 1000,  # how many reports may wait for one sink
    ) -> None:
        self._sinks = tuple(sinks)
        for sink in self._sinks:
            if not isinstance(sink, Sink):
                hint = f"; did you mean `{sink.__name__}()`?" if isinstance(sink, type) else ""
                raise ConfigError(f"sinks: {sink!r} is no dtrain.Sink{hint}")
            if sink.on_error not in ("warn", "raise"):
                raise ConfigError(
                    f"{type(sink).__name__}(on_error={sink.on_error!r}): choose 'warn' or 'raise'"
                )
        if capacity < 1:
            raise ConfigError(f"capacity={capacity}: at least one report must be able to wait")
        self._run_dir, self._active, self._capacity = run_dir, active, capacity
        self._workers: list[_Worker] = []
        self._is_open = False
        self._notices: list[threading.Thread] = []

    @property
    def failures(self) -> list[tuple[str, BaseException]]:
        """The sinks that failed, by name, and how; a ``TimeoutError`` for one that hung."""
        return [(w.label, w.error) for w in self._workers if w.error is not None]

    @property
    def dropped(self) -> dict[str, int]:
        """How many reports were left out of which sink because it was too slow."""
        return {w.label: w.dropped for w in self._workers if w.dropped}

    def check(self) -> None:
        """Raises SinkError if a sink with ``on_error="raise"`` has failed."""
        for name, error in ((w.label, w.error) for w in self._workers if w.must_work):
            if error is not None:
                raise SinkError(
                    f"the sink {name} failed, and on_error='raise': {_describe(error)}"
                ) from error

    def open(self) -> None:
        """Opens every sink, one by one; raises what one raises, and closes those before it."""
        if not self._active or self._is_open:
            return
        self._workers, self._is_open = [], True
        count: Counter[str] = Counter()
        for sink in self._sinks:
            kind = type(sink).__name__
            count[kind] += 1
            name = kind if count[kind] == 1 else f"{kind} ({count[kind]})"
            worker = _Worker(name, sink, self._capacity, self._run_dir)
            self._workers.append(worker)
            try:
                if not worker.is_open(_PATIENCE_S):
                    self._notify(
                        f"dtrain: the sink {name} is not open after {_PATIENCE_S:g} s, and the run "
                        f"waits for it; it is at {_where_is(worker)}"
                    )
                    worker.is_open()
            except BaseException as error:
                error.add_note(f"(while the sink {name} was opened)")
                self.close()
                raise

    def send(self, report: Report) -> None:
        """Hands ``report`` to every sink; the oldest ``train`` report is left out of full ones."""
        for worker in self._workers if self._is_open else ():
            if worker.put(report):
                self._notify(
                    f"dtrain: the sink {worker.label} is slower than the training: "
                    f"{self._capacity} reports wait for it. At step {report.step} some train "
                    "reports begin to be left out of it. Training goes on."
                )

    def flush(self, timeout_s: float = 10.0) -> None:
        """Returns once all that was sent is on the disk, of sinks that can tell; or in time."""
        deadline = time.monotonic() + timeout_s
        for worker in self._workers if self._is_open else ():
            worker.flush(deadline)

    def close(self, timeout_s: float = 10.0) -> None:
        """Returns once all is written and closed, or in time: who is late is named and left."""
        self._is_open = False
        deadline = time.monotonic() + timeout_s
        for worker in self._workers:
            worker.finish()
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive() and not worker.left_behind:
                self._notify(f"dtrain: {worker.leave_behind(timeout_s)}")
        for notice in self._notices:
            notice.join(1.0)
        self._notices.clear()

    def finish(self) -> None:
        """Closes; then raises SinkError if a sink with ``on_error="raise"`` has failed."""
        self.close()
        self.check()

    def _notify(self, text: str) -> None:
        # stderr can block as well (a paused terminal, a full pipe), and this thread trains.
        thread = threading.Thread(target=_say, args=(text,), name="dtrain-notice", daemon=True)
        thread.start()
        self._notices.append(thread)


class _Worker(threading.Thread):
    """One sink, the reports that wait for it, and the thread that opens, feeds and closes it."""

    def __init__(self, label: str, sink: Sink, capacity: int, run_dir: Path | None) -> None:
        # A daemon, so that a sink that hangs cannot keep the interpreter from ending.
        super().__init__(name=f"dtrain-sink-{label}", daemon=True)
        self.label, self.must_work = label, sink.on_error == "raise"
        self.error: BaseException | None = None
        self.dropped = 0
        self.left_behind = self._finishing = self._flushing = False
        self._sink, self._capacity, self._run_dir = sink, capacity, run_dir
        self._opened = threading.Event()
        self._unopened: BaseException | None = None  # what its open() raised
        self._waiting: deque[Report] = deque()
        self._changed = threading.Condition()  # guards everything above
        self.start()

    def put(self, report: Report) -> bool:
        """Queues ``report``; returns whether this was the first time that one was left out."""
        with self._changed:
            if self.error is not None:
                return False
            self._waiting.append(report)
            self._changed.notify_all()
            if len(self._waiting) <= self._capacity:
                return False
            trains = (i for i, waiting in enumerate(self._waiting) if waiting.kind == "train")
            del self._waiting[next(trains, 0)]
            self.dropped += 1
            return self.dropped == 1

    def flush(self, deadline: float) -> None:
        """Returns once the sink has written and flushed all that was put, or has failed."""
        if type(self._sink).flush is Sink.flush:
            return
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not self._flushing or self.error is not None or not self.is_alive(),
                max(0.0, deadline - time.monotonic()),
            )

    def is_open(self, timeout_s: float | None = None) -> bool:
        """Waits until the sink is open, and says whether it is; raises what its open() raised."""
        opened = self._opened.wait(timeout_s)
        if self._unopened is not None:
            raise self._unopened
        return opened

    def finish(self) -> None:
        """Lets the thread end once nothing waits any more."""
        with self._changed:
            self._finishing = True
            self._changed.notify_all()

    def leave_behind(self, timeout_s: float) -> str:
        """Hands the sink nothing more; returns what to tell a person."""
        with self._changed:
            self.left_behind = True
            text = (
                f"the sink {self.label} was not done after {timeout_s:g} s and is left behind at "
                f"{_where_is(self)}; reports that still waited for it: {len(self._waiting)}."
            )
            self._waiting.clear()
            self.error = TimeoutError(text) if self.error is None else self.error
            return text

    def run(self) -> None:
        """Opens the sink, writes until it is finished, fails or is left behind, and closes it.

        All in this thread: a database's connection, say, is of use only where it was made.
        """
        try:
            self._sink.open(self._run_dir)
        except BaseException as error:  # noqa: BLE001 -- raised by whoever waits for it
            self._unopened = error
            return
        finally:
            self._opened.set()
        failed: list[tuple[str, BaseException]] = []
        # Closed also after a failure, and before that is told: a sink may have redirected stderr.
        for where, action in (("write()", self._write_all), ("close()", self._sink.close)):
            if self.left_behind:
                return
            try:
                action()
            except BaseException as error:  # noqa: BLE001 -- the thread's outermost frame
                failed.append((where, error))
                with self._changed:
                    self.error = error if self.error is None else self.error
                    self._waiting.clear()
                    self._changed.notify_all()
        if failed:
            (where, first), *others = failed
            for _, other in others:
                first.add_note(f"(its close() failed as well: {_describe(other)})")
            outcome = "The run is stopped." if self.must_work else "Training goes on."
            _say(
                f"dtrain: the sink {self.label} failed in {where} and is left out from here on: "
                f"{_describe(first)}. {outcome}"
            )

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._finishing or self._flushing)
                report = self._waiting.popleft() if self._waiting else None
                if report is None and not self._flushing:
                    return
            if report is not None:
                self._sink.write(report)
                continue
            self._sink.flush()
            with self._changed:
                self._flushing = False
                self._changed.notify_all()


def _say(text: str) -> None:
    # Where stderr is closed, or never was, there is nobody to tell.
    with suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error} ({locate(error)})"


def _where_is(thread: threading.Thread) -> str:
    """Returns ``file:line`` where ``thread`` is now, outside of Python's own library."""
    frame = sys._current_frames().get(thread.ident or 0)
    for entry in reversed(traceback.extract_stack(frame) if frame is not None else []):
        if "/lib/python3" not in entry.filename and not entry.filename.startswith("<"):
            return f"{entry.filename}:{entry.lineno}"
    return "an unknown place"
