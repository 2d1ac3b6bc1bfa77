"""What the launcher and the nursery tell each other: one line of JSON each way for a launch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

#: Exit codes of a rank.
RECORDED, FAILED, NEVER_FIT = 0, 1, 3


@dataclass(frozen=True, slots=True)
class Order:
    """A launch.

    Attributes:
        runner: the module whose ``run_script(setup, folder, script, args)`` each rank calls.
        setup: for the runner, as JSON.
        folder: for records; each rank's output goes to ``rank-0.txt`` and so on.
        script: the file.
        args: of the script.
        environments: of each rank, to be added to the nursery's own.
        timeout_s: how long it may take, in seconds.
    """

    runner: str
    setup: str
    folder: str
    script: str
    args: list[str]
    environments: list[dict[str, str]]
    timeout_s: float

    def to_json(self) -> str:
        """Returns it as one line."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a launch.

    Attributes:
        codes: exit codes by rank; negative for a signal.
        late: time was over, and what still ran was killed.
    """

    codes: list[int]
    late: bool

    def to_json(self) -> str:
        """Returns it as one line."""
        return json.dumps(asdict(self))
