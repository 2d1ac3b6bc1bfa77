"""What hooks have said and not yet been reported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from dtrain.context.values import Number
from dtrain.errors import ConfigError

Reduce = Literal["mean", "sum", "max", "last"]


@dataclass(frozen=True, slots=True)
class Shown:
    """A text or a picture for the sinks.

    Attributes:
        name: what it is.
        text: any text.
        image: 8-bit values, ``[height, width]`` or ``[height, width, 3]``; or None.
    """

    name: str
    text: str = ""
    image: Any = None


@dataclass(slots=True)
class Logged:
    """Values logged under one name since the last sync point."""

    reduce: Reduce
    values: list[Number] = field(default_factory=list)


class Outbox:
    """Holds values, words and pictures until the next report takes them.

    Attributes:
        logged: values by name, in the order of their first calls.
        notes: words for the person at the terminal.
        shown: texts and pictures.

    Ranks: all, local.
    """

    def __init__(self) -> None:
        self.logged: dict[str, Logged] = {}
        self.notes: list[str] = []
        self.shown: list[Shown] = []

    def log(self, name: str, value: Number, reduce: Reduce) -> None:
        """Keeps a value; see :meth:`dtrain.Context.log`."""
        if reduce not in get_args(Reduce):
            raise ConfigError(f"log({name!r}, reduce={reduce!r}): one of {get_args(Reduce)}")
        logged = self.logged.setdefault(name, Logged(reduce))
        if logged.reduce != reduce:
            raise ConfigError(
                f"log({name!r}, reduce={reduce!r}): it was logged with {logged.reduce!r} before"
            )
        logged.values.append(value.detach() if isinstance(value, Tensor) else value)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Forgets what is logged in the block."""
        logged, self.logged = self.logged, {}
        try:
            yield
        finally:
            self.logged = logged
