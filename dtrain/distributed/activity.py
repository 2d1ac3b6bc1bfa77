"""Where the main thread is, for the watchdog, which reads it from another thread and posts it.

It writes plain attributes as it goes: no lock, no clock, well under a microsecond.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

_FORGET = 0.99  # how fast the slowest lap is forgotten: by half in about 70 laps


_UPDATE = 16  # more than any order within an update


@dataclass(frozen=True, slots=True)
class Phase:
    """Somewhere the main thread can be."""

    name: str  # in words, for messages; a hook's name where it is one
    waits: bool = False  # for other ranks; else it works there
    slow: bool = False  # it may take long there at any time: start, evaluation, saves
    reads: bool = False  # it waits for data: a file system may stall, and nobody is to blame
    order: int = 0  # where in a step: a rank at a greater one has passed this; 0 tells nothing
    call: str = ""  # which call all ranks must make that nobody leaves before all have come


START = Phase("the start of fit", slow=True)
STEP = Phase("a training step", order=1)
# Micro-batches of a step follow one another, so nobody can tell within them who is ahead.
FIRST_DATA = Phase("data", slow=True, reads=True, order=2)  # loaders start their workers
DATA = Phase("data", reads=True, order=2)
LOSS_FN = Phase("loss_fn", order=2)
OWN_BACKWARD = Phase("backward", order=2)  # of a micro-batch whose gradients are not reduced yet
BACKWARD = Phase("backward", waits=True, order=3, call="backward")
# Within a forward or a backward: other ranks may still be waiting for their data.
GATHERING = Phase("gathering parameters", waits=True)
SCATTERING = Phase("reducing gradients", waits=True)
ARRIVAL = Phase("agreeing on the step", waits=True, order=4)
UPDATE = Phase("update", order=5)
BETWEEN = Phase("between two steps", slow=True, order=9)
EVALUATION = Phase("evaluation", slow=True)
EVAL_DATA = Phase("data of an evaluation", reads=True)
EVAL_FIRST_DATA = Phase("data of an evaluation", slow=True, reads=True)
EVAL_LOSS_FN = Phase("loss_fn of an evaluation")
METRICS = Phase("agreeing on training metrics", slow=True)
SAVING = Phase("saving a checkpoint", slow=True)


@dataclass(slots=True)
class Laps:
    """How long what is done again and again takes: steps, batches of an evaluation."""

    count: int = 0
    slowest_s: float = 0.0  # recently; forgotten slowly
    _began: float = 0.0

    def begin(self) -> None:
        """A lap begins."""
        self._began = time.monotonic()

    def end(self) -> None:
        """It ends. What the first one took says nothing of those to come."""
        if self.count:
            took, known = time.monotonic() - self._began, self.slowest_s * _FORGET
            self.slowest_s = took if took > known else known
        self.count += 1


@dataclass(eq=False, slots=True)
class Activity:
    """What the main thread says of itself."""

    phase: Phase = START  # where it is
    signs: int = 0  # grows with every sign of progress
    step: int = 0  # the global step it is in, or was in last
    order: int = 0  # where in that step
    base: int = 0  # what phases of its updates before this one have come to
    watched: bool = False  # whether a watchdog looks at all this
    #: Says, once it is known, whether the others wait for this rank in a verb; a watchdog's.
    are_in_a_verb: Callable[[], bool] = lambda: False
    #: Leaves in the run's files why it ends, where the main thread cannot; those files'.
    leave_word: Callable[[str], None] = lambda reason: None
    steps: Laps = field(default_factory=Laps)
    batches: Laps = field(default_factory=Laps)
    laps: Laps | None = None  # of steps or batches, in the middle of one

    def restart(self) -> None:
        """A fit begins: its first step may take long."""
        self.steps, self.batches, self.laps = Laps(), Laps(), None
        self.enter(START)
        self.order = 0

    def restart_batches(self) -> None:
        """An evaluation begins: its first batch may take long."""
        self.batches = Laps()

    def enter(self, phase: Phase) -> Phase:
        """The main thread comes to ``phase``; returns where it was, to go back to."""
        before, self.phase = self.phase, phase
        self.signs += 1
        if phase.order:
            self.order = self.base + phase.order
        return before

    @contextmanager
    def long_operation(self, what: str) -> Iterator[None]:
        """What is done in the block may take long, as anything outside of a step may."""
        began = time.monotonic()
        before = self.enter(Phase(what, slow=True))
        try:
            yield
        finally:
            self.enter(before)
            if self.laps is not None:
                self.laps._began += time.monotonic() - began  # it says nothing of other laps

    def begin_step(self, step: int) -> None:
        """A global step begins."""
        self.step, self.base = step, 0
        self.laps = self.steps
        self.steps.begin()
        self.enter(STEP)

    def pass_on(self) -> None:
        """Another update of the same step begins."""
        self.base += _UPDATE

    def has_data(self, *, first: bool) -> None:
        """The data of a step has come; what the ``first`` of an epoch took does not count."""
        if first and self.laps is not None:
            self.laps.begin()
        self.enter(LOSS_FN)

    def begin_batch(self) -> None:
        """A batch of an evaluation begins."""
        self.laps = self.batches
        self.batches.begin()
        self.enter(EVAL_DATA if self.batches.count else EVAL_FIRST_DATA)

    def end_lap(self, phase: Phase) -> None:
        """The step or batch is over, and ``phase`` comes next."""
        if self.laps is not None:
            self.laps.end()
            self.laps = None
        self.enter(phase)

    def limit_s(self, hang_after_s: float, long_s: float) -> float:
        """Returns how long the main thread may be where it is without a sign of progress."""
        # In the first lap nobody knows yet how long one takes.
        if self.phase.slow or self.laps is None or not self.laps.count:
            return max(long_s, hang_after_s)
        return max(hang_after_s, 10 * self.laps.slowest_s)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What one rank posts of itself in the rendezvous store, for the others to read."""

    rank: int
    host: str
    pid: int
    machine: str  # equal where process numbers mean the same; nothing where that is not known
    number: int  # grows from post to post
    step: int = 0  # the global step it is in
    phase: str = ""  # where its main thread is: a hook, or a phase of the loop
    at: str = ""  # ``file:line`` of that, once it has stayed there for a moment
    waits: bool = False  # for other ranks
    quiet_s: float = 0.0  # for how long it has made no progress
    limit_s: float = 0.0  # how long that may be where it is
    inside: bool = False  # in ``fit`` or ``evaluate``; elsewhere nobody posts
    order: int = 0  # where in the step, as in Phase
    call: str = ""  # which call it sits in that nobody leaves before all ranks have come
    fit: int = 0  # the how manieth of this process
    started: int = 0  # when its process was, as the kernel counts it: numbers are given again
    address: str = ""  # where its host answers for it, as long as the process lives
    port: int = 0

    def to_json(self) -> str:
        """Returns what :meth:`from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Heartbeat":
        """Reads what :meth:`to_json` returned."""
        return cls(**json.loads(text))

    @property
    def who(self) -> str:
        """Rank, host and process, in words."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    @property
    def where(self) -> str:
        """Step, phase and line, in words."""
        if not self.inside:
            return "outside of fit"
        return f"step {self.step} in {self.phase}" + (f" ({self.at})" if self.at else "")


def heartbeat_key(rank: int) -> str:
    """Where in the store a rank posts."""
    return f"heartbeat/{rank}"
