"""The fits of a run: which of them a call of ``fit`` is, also where a script is started again."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from dtrain.context import Progress
from dtrain.errors import ConfigError

#: Why a fit ends that has done what was asked for.
BY_PLAN = ALL_EPOCHS, MAX_STEPS = ("all epochs done", "max_steps reached")


@dataclass(frozen=True, slots=True)
class Fit:
    """One of a run's fits: where it began, and how it ended, if it has."""

    name: str = ""
    step: int = 0  # global steps before it
    epoch: int = 0
    # Once it is over:
    reason: str = ""
    steps: int = 0  # in all
    epochs: int = 0
    updates: int = 0
    # As planned when it began, or was gone on with:
    total_steps: int | None = None
    total_epochs: int | None = None
    steps_per_epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def as_text(self) -> str:
        """Returns it in JSON."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__})

    @property
    def is_over(self) -> bool:
        """It has fulfilled its plan, or stopped by itself."""
        return bool(self.reason)

    def fulfils(self, epochs: int | None, max_steps: int | None) -> bool:
        """Says whether there is nothing left to train by a plan; a larger one than it had has.

        A fit that stopped by itself (early stopping) is not gone on with by a larger plan.
        """
        done = ((epochs, self.epochs - self.epoch), (max_steps, self.steps - self.step))
        more = all(limit is None or limit > have for limit, have in done)
        return self.is_over and not (more and self.reason in BY_PLAN)


@runtime_checkable
class FitsSlot(Protocol):
    """A checkpoint slot that says also which of a script's fits are saved at their end."""

    def due_after_fit(self, progress: Progress) -> bool:
        """Says whether this one is; equal on all ranks, must not communicate."""


def due_after_fit(slot: object, progress: Progress) -> bool:
    """Says whether a fit that ends is to be saved; each is, if the slot does not say otherwise."""
    return slot is not None and (not isinstance(slot, FitsSlot) or slot.due_after_fit(progress))


class Fits:
    """Which fits a run has had, in their order. Ranks: all, local; equal on all of them.

    A call without a name is the fit after that of the call before. So the same script finds its
    fits again.
    """

    def __init__(self, known: Iterable[Fit] = ()) -> None:
        self.known = [*known]
        self.own = sys.maxsize  # the first that this process trains
        self.restored = False  # the script has asked where the run is, and may leave fits out
        self._next = 0  # the place of the next call without a name
        self._texts: list[str] = []  # of those that are not gone on with any more

    def place(self, name: str | None) -> int:
        """Returns which fit of the run, from 0, a call is.

        Raises ConfigError where it cannot be known, or where that cannot be trained now.
        """
        known, names = self.known, [fit.name for fit in self.known]
        if name is not None and (not isinstance(name, str) or not name):
            raise ConfigError(f"fit(name={name!r}): a text that tells it from the run's other fits")
        if name is None and self.restored and self._next:
            raise ConfigError(
                "after trainer.restore(), which lets a script leave out what is done, a further "
                f"fit needs a name: fit(..., name='part {self._next}')"
            )
        if name is None:
            place = self._next
            if place < len(known) and known[place].name:
                raise ConfigError(
                    f"this is the run's fit {place}, which had a name, {known[place].name!r}: pass "
                    f"fit(name={known[place].name!r}), or begin anew by resume='never'"
                )
        else:
            place = names.index(name) if name in names else len(known)
            # A script that gives a fit a name which had none until now means the same one.
            same = place == len(known) and not self.restored and self._next < min(self.own, place)
            if same and not names[self._next]:
                place = self._next
                known[place] = replace(known[place], name=name)
        if place == len(known) and known and not known[-1].is_over:
            before = known[-1].name
            called = f"fit(name={before!r})" if before else f"the fit before it, number {place - 1}"
            raise ConfigError(
                f"fit{'' if name is None else f'(name={name!r})'} would begin a further fit of "
                f"this run, which is in the midst of another: call {called} first, as the script "
                "did then; or begin anew by resume='never'"
            )
        if self.own <= place < len(known) - 1:
            raise ConfigError(
                f"{self.words(place)} of this run is over, and others have trained on since: give "
                "each fit a name of its own, such as fit(name=f'part {number}')"
            )
        return place

    @property
    def are_many(self) -> bool:
        """Whether the script may go on with another fit, as far as one can know."""
        return len(self.known) > 1 or any(fit.name for fit in self.known)

    def is_over(self, place: int, epochs: int | None, max_steps: int | None) -> bool:
        """Says whether an earlier process has trained it, and all that a plan asks for."""
        earlier = place < min(self.own, len(self.known))
        is_last = place == len(self.known) - 1
        return earlier and (not is_last or self.known[place].fulfils(epochs, max_steps))

    def words(self, place: int) -> str:
        """Returns which fit that is, for messages."""
        name = self.known[place].name if place < len(self.known) else ""
        return f"fit {name!r}" if name else f"fit {place}"

    def returned(self, place: int) -> Fit:
        """Notes that a call has returned, which was that fit; returns what is known of it."""
        self._next = place + 1
        return self.known[place]

    def begin(self, place: int, name: str | None, progress: Progress) -> bool:
        """Notes that this process trains the fit of that place, which may be a new one.

        Returns whether it is new. ``progress`` then counts from its beginning.
        """
        new = place == len(self.known)
        if new:
            if place:  # a new one, in an order of its own
                progress.step_in_epoch = 0
            self.known.append(Fit(name or "", progress.step, progress.epoch))
        self.own = min(self.own, place)
        fit = self.known[place] = replace(self.known[place], reason="")
        progress.phase, progress.first_step, progress.first_epoch = place, fit.step, fit.epoch
        return new

    def plan(self, progress: Progress) -> None:
        """Notes how long the one that begins is to be."""
        self.known[-1] = replace(
            self.known[-1],
            total_steps=progress.total_steps,
            total_epochs=progress.total_epochs,
            steps_per_epoch=progress.steps_per_epoch,
        )

    def end(self, progress: Progress, reason: str, metrics: Mapping[str, float]) -> None:
        """Notes how the last one ended; it is over with a ``reason`` only."""
        self.known[-1] = self.as_ended(progress, reason, metrics)

    def as_ended(self, progress: Progress, reason: str, metrics: Mapping[str, float]) -> Fit:
        """Returns the last one, ended so."""
        last = replace(self.known[-1], reason=reason, metrics=dict(metrics))
        return replace(last, steps=progress.step, epochs=progress.epoch, updates=progress.updates)

    def as_text(self, last: Fit | None = None) -> str:
        """Returns them as a checkpoint holds them: in one text, as there may be thousands.

        ``last`` is to stand for the last one.
        """
        self._texts += [fit.as_text() for fit in self.known[len(self._texts) : -1]]
        return f"[{', '.join([*self._texts, (last or self.known[-1]).as_text()])}]"

    @classmethod
    def of_text(cls, text: str) -> "Fits":
        """Returns what :meth:`as_text` has noted."""
        return cls(Fit(**one) for one in json.loads(text))
