"""Feeds streams: iterables of ready batches, each rank its own; and where a resume goes on in one.

A stream that can tell its state is asked for it seldom, because that may be expensive. What a
checkpoint holds is a *mark*, the state at some batch, and how many batches were given since; these
are skipped when the run goes on. Mostly there are none, as a save between two steps asks anew. It
cannot where a batch is held (``when_uneven="stop"`` looks ahead), or a failed step is undone.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch

from dtrain.data.alike import figure_of
from dtrain.data.counting import Count, count_ready
from dtrain.data.feed import EndOfStream, Feed, MicroBatch, MicroBatches, tell_epoch
from dtrain.data.shipping import Shipper
from dtrain.data.source import Data
from dtrain.distributed import World, random_state_kept, random_state_of_host, restore_random_state
from dtrain.errors import CheckpointError, ResumeError

# After so many batches a stream is asked for its state; so many at most are skipped.
MARK_EVERY = 16
# Copies a state for a checkpoint; raises CheckpointError where no checkpoint could hold it.
CopyState = Callable[[dict[str, Any]], dict[str, Any]]


class StreamFeed(Feed):
    """Feeds an iterable of ready batches, each rank its own stream. Ranks: all, local.

    Without ``copy_state`` no checkpoint is made, and the stream is never asked for its state.
    """

    steps_per_epoch = None  # a length is this rank's alone; the plan must be equal on all of them

    def __init__(
        self, data: Data, world: World, batches_per_step: int, copy_state: CopyState | None = None
    ) -> None:
        self._data, self._world = data, world
        self._shipper = Shipper(world.device)
        # Such as a StatefulDataLoader: its state is made of dicts, lists, tuples, tensors, numbers
        # and text; once one is loaded, the next `iter()` goes on where it was told.
        tells = hasattr(data.dataset, "state_dict") and hasattr(data.dataset, "load_state_dict")
        self._stateful = data.dataset if tells else None
        self._batches_per_step = batches_per_step  # consecutive ones of this rank
        self._copy_state = copy_state
        self._epoch = -1
        self._pass: _Pass | None = None
        self._loaded: dict[str, Any] | None = None  # until the first epoch begins
        self._first: tuple[float, float] | None = None  # a figure of the first batch
        self._looked = False

    def __str__(self) -> str:
        return f"a stream of each rank's own (when_uneven={self._data.when_uneven!r})"

    def begin(self, epoch: int) -> None:
        """Tells the stream of ``epoch``; its length is this rank's alone."""
        tell_epoch(self._data.dataset, epoch)

    def look_apart(self) -> str:
        if self._looked or self._world.size == 1:
            return ""
        self._looked = True
        mine = torch.tensor(self._first or (0.0, 0.0), dtype=torch.float64)
        everyones = self._world.comm.all_gather("first batches", mine)
        _, scale = everyones[0].tolist()
        if not scale or bool((everyones != everyones[0]).any()):
            return ""
        return (
            "warning: all ranks' streams gave the same first batch: each rank seems to have "
            "all of the data, as from a DataLoader in a wrapper. Pass the dataset itself with the "
            "global batch_size, or have each rank's stream give its own part"
        )

    def _note_first(self, batch: Any) -> None:
        if self._first is None:
            self._first = figure_of(batch)

    def epoch(self, epoch: int, first_step: int) -> Iterator[MicroBatches]:
        looks_ahead = self._data.when_uneven == "stop"
        loaded = self._loaded
        if loaded is not None and loaded["epoch"] == epoch:
            with random_state_kept():  # the streams of random numbers are where they were saved
                current = self._go_on(loaded, epoch)
                if looks_ahead and first_step:
                    current.ends_before(first_step)
        else:
            before = None if self._pass is None else self._pass.end()
            if loaded is not None and self._stateful is not None:
                before = loaded
                with random_state_kept():
                    # Ends that pass, as the saved run did.
                    self._go_on(loaded, loaded["epoch"]).skip()
                tell_epoch(self._data.dataset, epoch)
            current = self._begin(before)
            current.skip(first_step * self._batches_per_step)
        self._loaded, self._epoch, self._pass = None, epoch, current
        micros, shipper = self._batches_per_step, self._shipper
        for step in count(first_step):
            of = self._data.count, self._note_first
            yield _StreamStep(micros, step, current, shipper, looks_ahead, *of)

    def _begin(self, before: dict[str, Any] | None) -> "_Pass":
        tell = begun = None
        if self._copy_state is not None and self._stateful is not None:
            tell = partial(_tell_state, self._stateful, self._copy_state)
        elif self._copy_state is not None:
            begun = random_state_of_host()
        return _Pass(iter(self._data.dataset), tell, before, begun)

    def _go_on(self, place: dict[str, Any], epoch: int) -> "_Pass":
        """Returns the pass over the stream, of ``epoch``, that the saved run was in."""
        skip = place["skip"]
        if self._stateful is None:
            skip = place["batches"]
            if place["begun"] is not None:
                restore_random_state(place["begun"])  # for a shuffle, and the seeds of workers
        elif place["stream"] is None and place["before"] is not None:
            self._go_on(place["before"], epoch - 1).skip()
        tell_epoch(self._data.dataset, epoch)
        if self._stateful is not None and place["stream"] is not None:
            self._stateful.load_state_dict(place["stream"])
        current = self._begin(place["before"])
        current.begun, current.given = place["begun"], place["batches"] - skip
        current.skip(skip)
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
        if ranks != self._world.size:
            if not step and self._stateful is None:
                return ""  # each pass over it begins anew
            raise ResumeError(
                f"the run was saved on {ranks} ranks and this is {self._world.size}, but each rank "
                f"has a stream of its own: {'they cannot' if step else 'their states cannot'} be "
                f"shared out anew. Go on with {ranks} ranks, or pass resume='never' to begin anew "
                "(the old files are moved aside). A map-style dataset with a batch_size goes on at "
                "any number of ranks; so does a stream without state_dict, from the end of an "
                "epoch."
            )
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


def _tell_state(stream: Any, copy_state: CopyState) -> Any:
    """Returns a copy of a stream's state, because streams go on."""
    name = type(stream).__name__
    try:
        return copy_state({"state_dict": stream.state_dict()})["state_dict"]
    except CheckpointError as error:
        raise CheckpointError(
            f"the stream ({name}) cannot be saved: {error}\nMake it of such values, or leave "
            "state_dict out: a resumed run then skips through from the stream's beginning."
        ) from error
    except Exception as error:
        raise CheckpointError(f"the stream's state_dict() failed ({name}): {error!r}") from error


@dataclass
class _Pass:
    """One pass over a stream. It can be asked whether it has ended, and from where to go on."""

    batches: Iterator[Any]
    tell_state: Callable[[], Any] | None  # returns a copy, if the stream is to be asked for it
    before: dict[str, Any] | None  # where the pass before this one ended, if it is known
    begun: dict[str, Any] | None  # the streams of random numbers when this pass began

    def __post_init__(self) -> None:
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

    def ends_before(self, step: int) -> bool:
        """Says whether there is nothing for ``step``, and holds its first batch."""
        self.begin(step)
        if not self._held:
            with suppress(EndOfStream):
                self._held.append(self.next())
        return not self._held

    def skip(self, batches: int = 1) -> None:
        with suppress(EndOfStream):
            for _ in range(batches):
                self.next()

    def next(self) -> Any:
        if self._held:
            return self._held.pop()
        if self._ended:
            raise EndOfStream
        # In the middle of a step only if there is none: the two must reach back to its start.
        at_start = bool(self._starts) and self._starts[-1][1] == self.given
        if not self._marks or (at_start and self.given - self._marks[-1][0] >= MARK_EVERY):
            self._mark()
        try:
            batch = next(self.batches)
        except StopIteration:
            self._ended = True
            raise EndOfStream from None
        self.given += 1
        return batch

    def _mark(self) -> None:
        # What a stream tells before the first batch, or after its end, may be of another pass.
        if self.tell_state is None or not self.given or self._ended:
            return
        if not self._marks or self._marks[-1][0] != self.given:
            self._marks.append((self.given, self.tell_state()))

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
            "before": None if marked else self.before,
        }

    def end(self) -> dict[str, Any] | None:
        """Returns from where to go on after this pass, if it can be told."""
        if self.tell_state is None:
            return None
        return self.place(None) if self._marks else self.before


@dataclass(slots=True)
class _StreamStep(MicroBatches):
    micros: int
    number: int
    current: _Pass
    shipper: Shipper
    looks_ahead: bool
    count: Count | None
    note: Callable[[Any], None]

    def next(self) -> MicroBatch | None:
        self.current.begin(self.number)
        self.note(batch := self.current.next())
        samples = count_ready(batch, self.count)
        return self.shipper.ship(batch), samples

    def is_last(self) -> bool:
        return self.looks_ahead and self.current.ends_before(self.number + 1)
