"""What hooks have said and not yet been reported, and what they ask for."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dtrain.context.step import Number
from dtrain.errors import ConfigError

Reduce = Literal["mean", "sum", "max", "last"]

#: What dtrain reports, and what comes with each report.
_OWN = {"train/loss", "lr", "loss_scale", "updates", "vetoed", "skipped"}
_OWN |= {"step", "epoch", "kind", "seconds", "samples"}


def check_name(name: str) -> None:
    """Raises ConfigError where a callback gives a figure a name of dtrain's own."""
    if name in _OWN or name.startswith(("lr/", "epoch/")):
        raise ConfigError(
            f"{name!r} is the name of a figure that dtrain itself reports; call yours otherwise, "
            f"such as 'my/{name}'"
        )


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

    def add(self, name: str, value: Number, reduce: Reduce) -> None:
        """Keeps a figure of dtrain's own; callbacks use :meth:`~dtrain.Context.log`."""
        self.logged.setdefault(name, Logged(reduce)).values.append(value)


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
            ConfigError: called outside of ``on_batch``, ``on_loss`` and the loss function, that of
                an evaluation included.
        """
        if not self.skippable:
            raise ConfigError(
                f"request.skip({why!r}) works in on_batch and on_loss only, and in the loss "
                "function: elsewhere no micro-batch is under way that could be left out"
            )
        self.skipped.append(why)
