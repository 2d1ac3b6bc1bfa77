"""What hooks have said and not yet been reported, and what they ask for."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dtrain.context.step import Number
from dtrain.errors import ConfigError

Reduce = Literal["mean", "sum", "max", "last"]


@dataclass(frozen=True, slots=True)
class Shown:
    """A text or a picture (8-bit, ``[height, width]`` or ``[height, width, 3]``) for the sinks."""

    name: str
    text: str = ""
    image: Any = None


@dataclass(slots=True)
class Logged:
    """Values logged under one name since the last sync point."""

    reduce: Reduce
    values: list[Number] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Outbox:
    """Holds values, words and pictures until the next report takes them."""

    logged: dict[str, Logged] = field(default_factory=dict)  # in the order of their first calls
    notes: list[str] = field(default_factory=list)  # for the person at the terminal
    shown: list[Shown] = field(default_factory=list)


class Request:
    """What a callback asks of the run. Nothing here communicates; the loop makes it agreed.

    Ranks: all, local.
    """

    __slots__ = ("pending", "skippable", "skipped")

    def __init__(self) -> None:
        self.pending: dict[str, list[str]] = {"stop": [], "save": [], "preempt": []}
        self.skippable = False
        self.skipped: list[str] = []

    def stop(self, why: str) -> None:
        """Asks that all ranks stop after the same step. One rank's wish suffices."""
        self.pending["stop"].append(why)

    def save(self, why: str) -> None:
        """Asks for a checkpoint, made by all ranks at the same step."""
        self.pending["save"].append(why)

    def preempt(self, why: str) -> None:
        """Asks to save and leave: the run is to be continued by another start."""
        self.pending["preempt"].append(why)

    def skip(self, why: str) -> None:
        """Leaves this rank's micro-batch out, as if its weight were 0.

        Raises:
            ConfigError: called outside of ``on_batch`` and ``on_loss``.
        """
        if not self.skippable:
            raise ConfigError(
                f"request.skip({why!r}) works in on_batch and on_loss only: elsewhere no "
                "micro-batch is under way that could be left out"
            )
        self.skipped.append(why)
