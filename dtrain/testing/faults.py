"""Planted faults: one rank raises, dies, stops, is late or gets a signal, at a step and a hook."""

import difflib
import os
import signal
import threading
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event as ProcessEvent
from typing import Any, ClassVar, Protocol

from dtrain.callback import HOOK_NAMES, Callback
from dtrain.context import Context, Step
from dtrain.distributed import current
from dtrain.errors import ConfigError
from dtrain.testing.turns import aside


class What(Protocol):
    """What is to go wrong."""

    in_threads: ClassVar[bool] = True  # whether it can befall one rank where ranks are threads

    def happen(self) -> None:
        """Goes wrong, on the rank that is to suffer it."""


@dataclass(frozen=True)
class Raise(What):
    """Raises an exception."""

    error: BaseException

    def happen(self) -> None:
        raise self.error


@dataclass(frozen=True)
class Signal(What):
    """Sends a signal to the rank's process."""

    number: int  # such as signal.SIGTERM
    in_threads: ClassVar[bool] = False

    def happen(self) -> None:
        os.kill(os.getpid(), self.number)


@dataclass(frozen=True)
class Kill(Signal):
    """Ends the rank's process at once, as the kernel does where memory is short."""

    number: int = field(default=signal.SIGKILL, init=False)


@dataclass(frozen=True)
class Stop(Signal):
    """Stops the rank's process: it neither goes on nor ends, until somebody sends SIGCONT."""

    number: int = field(default=signal.SIGSTOP, init=False)


@dataclass(frozen=True)
class Delay(What):
    """Keeps the rank waiting; other ranks go on as far as they can."""

    until: float | threading.Event | ProcessEvent  # seconds, or an event to wait for
    timeout_s: float = 10.0  # how long an event may take to happen

    def happen(self) -> None:
        """Waits; raises TimeoutError where the event did not happen."""
        with aside():
            if isinstance(self.until, float | int):
                threading.Event().wait(self.until)
            elif not self.until.wait(self.timeout_s):
                raise TimeoutError(f"what Delay waits for did not happen in {self.timeout_s:g} s")


class Fault(Callback):
    """Makes something go wrong on one rank, once.

    A fault that was planted where the run never comes is an error at the end of ``fit``.

    Example::

        callbacks = [MyCallback(), Fault(Raise(OSError("disk full")), rank=1, step=3)]

    Args:
        what: ``Raise(error)``, ``Kill()``, ``Stop()``, ``Signal(number)`` or ``Delay(until)``.
        rank: where.
        step: when: in the step with this number (0 is the first) or, in a hook that is not of a
            step, as soon as so many steps are taken. Of several micro-batches, the first counts.
        hook: in which hook.

    Raises:
        ConfigError: there is no such hook or rank, or ranks are threads and it would hit all.

    Ranks: all; it happens on one.
    """

    def __init__(self, what: What, *, rank: int, step: int = 0, hook: str = "on_loss") -> None:
        if hook not in HOOK_NAMES:
            close = difflib.get_close_matches(hook, HOOK_NAMES, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"Fault(hook={hook!r}): {hint}The hooks are {', '.join(HOOK_NAMES)}")
        if rank < 0 or step < 0:
            raise ConfigError(f"Fault(rank={rank}, step={step}): must be 0 or more")
        self.name = f"Fault at {hook} of step {step} on rank {rank}"
        self.happened = False
        self._what, self._rank, self._step, self._hook = what, rank, step, hook

    def on_fit_start(self, ctx: Context) -> None:
        """Checks that it can happen: raises ConfigError if not."""
        world = current()
        size = 1 if world is None else world.size
        if self._rank >= size:
            raise ConfigError(f"{self.name}: there are {size} ranks, counted from 0")
        if world and world.launcher == "threads" and not self._what.in_threads:
            raise ConfigError(
                f"{self.name}: {type(self._what).__name__} is for a process, and ranks are threads "
                "here, so that it would hit the test itself; use run_processes"
            )
        self._at("on_fit_start", ctx.progress.step >= self._step)

    def on_fit_end(self, ctx: Context) -> None:
        """Raises ConfigError if it has not happened: it will not any more."""
        self._at("on_fit_end", ctx.progress.step >= self._step)
        if self._is_here() and not self.happened:
            raise ConfigError(
                f"{self.name} never happened: the run ended well after {ctx.progress.step} steps"
            )

    def _at(self, hook: str, due: bool) -> None:
        if hook == self._hook and due and not self.happened and self._is_here():
            self.happened = True
            self._what.happen()

    def _is_here(self) -> bool:
        world = current()
        return self._rank == (0 if world is None else world.rank)


# Any: no Callable has the names of a hook's arguments.
def _happens_in(hook: str) -> Any:
    def happens(self: Fault, ctx: Context, more: Any = None) -> None:
        in_step = isinstance(more, Step) and hook != "on_eval_batch"
        self._at(hook, more.number == self._step if in_step else ctx.progress.step >= self._step)

    return happens


for _hook in set(HOOK_NAMES) - {*vars(Fault)}:
    setattr(Fault, _hook, _happens_in(_hook))
