"""A whole training as it was drilled: all starts of it, and the state it ended with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dtrain.checkpoint import format as files
from dtrain.errors import CheckError
from dtrain.trials.drill.record import StartRecord

#: Of a checkpoint's state: what a resumed run must end with, as one that was left alone.
_KEPT = ("progress", "optimizer", "precision", "callbacks", "shared_rng")


@dataclass(frozen=True, slots=True)
class Final:
    """What a run's newest checkpoint holds.

    Attributes:
        step: after which it was made.
        model: parameters and buffers.
        state: the rest, flat: from a path such as ``optimizer/state/0/exp_avg`` to its value.
    """

    step: int
    model: dict[str, Tensor]
    state: dict[str, Any]

    @classmethod
    def read(cls, run_dir: Path) -> Final:
        """Reads the newest intact checkpoint of a run.

        Raises:
            CheckError: there is none.

        Ranks: none; what they wrote is read.
        """
        saved, damage = files.find(run_dir / "checkpoints")
        if saved is None:
            raise CheckError(
                "the training came to its end and left no intact checkpoint"
                + "".join(f"; {what}" for what in damage)
            )
        state = files.load_state(saved.path)
        kept = {name: state[name] for name in _KEPT}
        return cls(saved.step, files.load_model(saved.path), dict(_leaves(kept, "")))


@dataclass(frozen=True, slots=True)
class Run:
    """One training, from its first start to its end.

    Attributes:
        starts: in order; all but the last ended early.
        final: what it ended with.
    """

    starts: tuple[StartRecord, ...]
    final: Final


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _leaves(below, f"{path}/{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for place, below in enumerate(value):
            yield from _leaves(below, f"{path}/{place}")
    else:
        yield path, value
