"""What hooks have said and not yet been reported."""

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
    """Holds values, words and pictures until the next report takes them.

    Ranks: all, local.
    """

    logged: dict[str, Logged] = field(default_factory=dict)  # in the order of their first calls
    notes: list[str] = field(default_factory=list)  # for the person at the terminal
    shown: list[Shown] = field(default_factory=list)

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
