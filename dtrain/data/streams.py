"""Feeds streams: iterables of ready batches, each rank its own; and where a resume goes on in one.

A stream that can tell its state is asked for it seldom, because that may be expensive. What a
checkpoint holds is a *mark*, the state at some batch, and how many batches were given since; these
are skipped when the run goes on. In most checkpoints there are none: a save between two steps asks
for the state of that moment. It cannot do so where a batch is held already (``when_uneven="stop"``
looks ahead), or where a step is undone that had batches already (a step that failed).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch

from dtrain.data.feed import EndOfStream, Feed, MicroBatch, MicroBatches
from dtrain.data.shipping import ship
from dtrain.data.source import Data
from dtrain.distributed import World, random_state_kept, random_state_of_host, restore_random_state
from dtrain.errors import CheckpointError, DataError, ResumeError

#: After so many batches a stream is asked for its state; so many at most are skipped.
MARK_EVERY = 16

#: Copies a state for a checkpoint; raises CheckpointError where no checkpoint could hold it.
CopyState = Callable[[dict[str, Any]], dict[str, Any]]


@runtime_checkable
class Stateful(Protocol):
    """A stream that can tell where it is, and go on there; such as a StatefulDataLoader.

    After ``load_state_dict(state)`` the next ``iter()`` goes on where ``state_dict()`` was called.
    """

    def state_dict(self) -> dict[str, Any]:
        """Returns dicts, lists, tuples, tensors, numbers and text."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` returned."""


class StreamFeed(Feed):
    """Feeds an iterable of ready batches, each rank its own stream.

    Args:
        data: made without a batch size.
        world: which device, and how many ranks.
        batches_per_step: how many consecutive batches of a rank make a step.
        copy_state: copies the stream's state; None where no checkpoint is made, and the stream is
            never asked for it.

    Ranks: all, local.
    """

    def __init__(
        self, data: Data, world: World, batches_per_step: int, copy_state: CopyState | None = None
    ) -> None:
        self._stream: Iterable[Any] = data.dataset
        self._stateful = data.dataset if isinstance(data.dataset, Stateful) else None
        self._device = world.device
        self._ranks = world.size
        self._batches_per_step = batches_per_step
        self._when_uneven = data.when_uneven
        self._copy_state = copy_state
        # A length is this rank's alone; the plan must be equal on all of them.
        self.steps_per_epoch = None
        self._epoch = -1
        self._pass: _Pass | None = None
        self._loaded: dict[str, Any] | None = None  # until the first epoch begins

    def __str__(self) -> str:
        return f"a stream of each rank's own (when_uneven={self._when_uneven!r})"

    def epoch(self, epoch: int, first_step: int) -> Iterator[MicroBatches]:
        """Yields steps without end; whoever calls stops once every rank's stream has ended."""
        looks_ahead = self._when_uneven == "stop"
        loaded = self._loaded
        if loaded is not None and loaded["epoch"] == epoch:
            with random_state_kept():  # the streams of random numbers are where they were saved
                current = self._go_on(loaded)
                if looks_ahead and first_step:
                    current.begin(first_step)
                    current.has_ended()
        else:
            before = None if self._pass is None else self._pass.end()
            if loaded is not None and self._stateful is not None:
                before = loaded
                with random_state_kept():
                    self._go_on(loaded).skip()  # ends that pass, as the saved run did
            current = self._begin(before)
            for _ in range(first_step * self._batches_per_step):
                current.skip()
        self._loaded, self._epoch, self._pass = None, epoch, current
        for step in count(first_step):
            yield _StreamStep(self._batches_per_step, step, current, self._device, looks_ahead)

    def _begin(self, before: dict[str, Any] | None) -> "_Pass":
        tell = begun = None
        if self._copy_state is not None and self._stateful is not None:
            tell = partial(_tell_state, self._stateful, self._copy_state)
        elif self._copy_state is not None:
            begun = random_state_of_host()
        return _Pass(iter(self._stream), tell, before, begun)

    def _go_on(self, place: dict[str, Any]) -> "_Pass":
        """Returns the pass over the stream that the saved run was in the middle of."""
        skip = place["skip"]
        if self._stateful is None:
            skip = place["batches"]
            if place["begun"] is not None:
                restore_random_state(place["begun"])  # for a shuffle, and the seeds of workers
        elif place["stream"] is not None:
            self._stateful.load_state_dict(place["stream"])
        elif place["before"] is not None:
            self._go_on(place["before"]).skip()
        current = self._begin(place["before"])
        current.begun, current.given = place["begun"], place["batches"] - skip
        for _ in range(skip):
            current.skip()
        return current

    def state_dict(self, epoch: int, step: int) -> dict[str, Any] | None:
        """Returns where this rank's stream is after ``step`` steps of ``epoch``."""
        if self._pass is None:
            return self._loaded  # nothing was fetched since; None if nothing ever was
        # An epoch that is over was left where it ended.
        return self._pass.place(step if epoch == self._epoch else None) | {"epoch": self._epoch}

    def load_state_dict(
        self, state: dict[str, Any] | None, *, ranks: int, epoch: int, step: int
    ) -> str:
        """Has the next epoch go on where the saved run was."""
        if ranks != self._ranks:
            if step or self._stateful is not None:
                raise ResumeError(
                    f"the run was saved on {ranks} ranks and this is {self._ranks}, but each rank "
                    f"has a stream of its own: {'they cannot' if step else 'their states cannot'} "
                    f"be shared out anew. Go on with {ranks} ranks, or pass resume='never' to "
                    "begin anew (the old files are moved aside). A map-style dataset with a "
                    "batch_size goes on at any number of ranks; so does a stream without "
                    "state_dict, from the end of an epoch."
                )
            return ""  # each pass over it begins anew
        told = state is not None and (state["stream"] or state["before"])
        if told or step:
            self._loaded = state
        if not step or (told and self._stateful is not None):
            return ""
        batches = step * self._batches_per_step if state is None else state["batches"]
        lacks = "its state was not saved" if self._stateful else "it has no state_dict"
        return (
            f"{batches} batches of the stream are skipped through from its beginning, because "
            f"{lacks}; what it drew at random in between, in this process, is not drawn again"
        )


def _tell_state(stream: Stateful, copy_state: CopyState) -> Any:
    """Returns a copy of a stream's state, because streams go on."""
    name = type(stream).__name__
    try:
        return copy_state({"state_dict": stream.state_dict()})["state_dict"]
    except Exception as error:
        raise CheckpointError(
            f"the stream ({name}) cannot be saved: {error}\nMake it of such values, or leave "
            "state_dict out: a resumed run then skips through from the stream's beginning."
            if isinstance(error, CheckpointError)
            else f"the stream's state_dict() failed ({name}): {error!r}"
        ) from error


class _Pass:
    """One pass over a stream. It can be asked whether it has ended, and from where to go on."""

    def __init__(
        self,
        batches: Iterator[Any],
        tell_state: Callable[[], Any] | None,
        before: dict[str, Any] | None,
        begun: dict[str, Any] | None,
    ) -> None:
        self._batches = batches
        self._tell_state = tell_state  # returns a copy, if the stream is to be asked for it
        self._before = before  # where the pass before this one ended, if it is known
        self.begun = begun  # the streams of random numbers when this pass began
        self._held: list[Any] = []
        self._ended = False
        self.given = 0  # batches that the stream has given, with the one that is held
        # Of the newest steps: a step may be undone when the next one's first batch is held.
        self._starts: deque[tuple[int, int]] = deque(maxlen=2)
        # The stream's state once it had given so many batches.
        self._marks: deque[tuple[int, Any]] = deque(maxlen=2)

    def begin(self, step: int) -> None:
        """Takes notice that what is fetched from here on is for ``step``."""
        if not self._starts or self._starts[-1][0] < step:
            self._starts.append((step, self.given))

    def has_ended(self) -> bool:
        if not self._held:
            with suppress(StopIteration):
                self._held.append(self._fetch())
        return not self._held

    def next(self) -> Any:
        return self._held.pop() if self._held else self._fetch()

    def skip(self) -> None:
        with suppress(StopIteration):
            self._fetch()

    def _fetch(self) -> Any:
        if self._ended:
            raise StopIteration
        # In the middle of a step only if there is none: the two must reach back to its start.
        at_start = bool(self._starts) and self._starts[-1][1] == self.given
        if not self._marks or (at_start and self.given - self._marks[-1][0] >= MARK_EVERY):
            self._mark()
        try:
            batch = next(self._batches)
        except StopIteration:
            self._ended = True
            raise
        self.given += 1
        return batch

    def _mark(self) -> None:
        # What a stream tells before the first batch, or after its end, may be of another pass.
        if self._tell_state is None or not self.given or self._ended:
            return
        if not self._marks or self._marks[-1][0] != self.given:
            self._marks.append((self.given, self._tell_state()))

    def place(self, step: int | None) -> dict[str, Any]:
        """Returns from where to go on with ``step``, or with what follows if that is None."""
        given = dict(self._starts).get(-1 if step is None else step, self.given - len(self._held))
        if given == self.given:
            self._mark()
        marks = (mark for mark in reversed(self._marks) if mark[0] <= given)
        marked, stream = next(marks, (0, None))
        return {
            "batches": given,
            "begun": self.begun,
            "stream": stream,
            "skip": given - marked,
            "before": None if marked else self._before,
        }

    def end(self) -> dict[str, Any] | None:
        """Returns from where to go on after this pass, if it can be told."""
        if self._tell_state is None:
            return None
        return self.place(None) if self._marks else self._before


@dataclass(slots=True)
class _StreamStep(MicroBatches):
    micros: int
    number: int
    current: _Pass
    device: torch.device
    looks_ahead: bool

    def next(self) -> MicroBatch | None:
        self.current.begin(self.number)
        try:
            batch = self.current.next()
        except StopIteration:
            raise EndOfStream from None
        samples = _count_samples(batch)
        if samples is None:
            raise DataError(
                f"a stream yielded {type(batch).__name__} without a tensor in it, so its number of "
                "samples is unknown; yield tensors, or lists or dicts of tensors"
            )
        return ship(batch, self.device), samples

    def is_last(self) -> bool:
        if not self.looks_ahead:
            return False
        self.current.begin(self.number + 1)
        return self.current.has_ended()


def _count_samples(batch: Any) -> int | None:
    """Returns the length of the first tensor in a batch that has one, or None."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        counts = (_count_samples(part) for part in batch)
        return next((count for count in counts if count is not None), None)
    return None
