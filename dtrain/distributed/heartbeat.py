"""What a rank posts of itself in the rendezvous store, for the others to read."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What one rank posts of itself."""

    rank: int
    host: str
    pid: int
    machine: str  # equal where process numbers mean the same; nothing where that is not known
    number: int  # grows from post to post
    step: int = 0  # the global step it is in
    phase: str = ""  # where its main thread is: a hook, or a phase of the loop
    at: str = ""  # ``file:line`` of that, once it has stayed there for a moment
    waits: bool = False  # for other ranks
    quiet_s: float = 0.0  # for how long it has made no progress
    limit_s: float = 0.0  # how long that may be where it is
    inside: bool = False  # in ``fit`` or ``evaluate``; elsewhere nobody posts

    def to_json(self) -> str:
        """Returns what :meth:`from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Heartbeat":
        """Reads what :meth:`to_json` returned."""
        return cls(**json.loads(text))

    @property
    def who(self) -> str:
        """Rank, host and process, in words."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    @property
    def where(self) -> str:
        """Step, phase and line, in words."""
        if not self.inside:
            return "outside of fit"
        return f"step {self.step} in {self.phase}" + (f" ({self.at})" if self.at else "")


def heartbeat_key(rank: int) -> str:
    """Where in the store a rank posts."""
    return f"heartbeat/{rank}"
