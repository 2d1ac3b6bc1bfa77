"""What a rank is told about one start of a script: where to keep things, and what befalls it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["kill all", "kill one", "kill writing", "kill renaming", "preempt"]

#: In which hooks a step can be broken off: before the update of the parameters, and after it.
HOOKS = ("on_grads_ready", "on_step_end")

#: How many files of a checkpoint rank 0 writes at least, and any other rank.
MAIN_WRITES, OTHER_WRITES = 5, 2
#: How many moments there are around its renaming.
MOMENTS = 2


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, once.

    Attributes:
        kind: ``kill all`` and ``kill one`` send SIGKILL in a step, ``kill writing`` sends it to a
            rank that has written half a file of a checkpoint, ``kill renaming`` to rank 0 just
            before or after the checkpoint gets its name, ``preempt`` sends SIGTERM to one rank.
        step: how many steps are done by then: with ``on_grads_ready``, without that step's own.
        rank: the one that suffers it.
        hook: from :data:`HOOKS`.
        place: at which of the rank's files, or at which moment, from 0.
    """

    kind: Kind
    step: int
    rank: int = 0
    hook: str = "on_step_end"
    place: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a script.

    Attributes:
        run_dir: in place of the script's own.
        steps: global steps of the run, at most.
        save_every: a checkpoint every so many steps, beside the script's own.
        fault: what befalls this start; None leaves it alone.
    """

    run_dir: str
    steps: int
    save_every: int
    fault: Fault | None = None

    def to_json(self) -> str:
        """Returns it as text for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Start:
        """Returns what :meth:`to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        fault = values.pop("fault")
        return cls(**values, fault=None if fault is None else Fault(**fault))
