"""Whether a run fails again and again without coming any further.

Ranks: rank 0 only.
"""

from dataclasses import dataclass

from dtrain.checkpoint.status import Status
from dtrain.errors import CrashLoop

#: So often in a row a run may fail without having come any further.
MAX_FAILURES = 3


@dataclass(frozen=True, slots=True)
class Failures:
    """How often in a row a run failed without having come any further.

    Attributes:
        at: the furthest step, or -1.
        count: how often.
    """

    at: int = -1
    count: int = 0

    def then(self, step: int) -> "Failures":
        """Counts a failure at ``step``."""
        return Failures(step, 1) if step > self.at else Failures(self.at, self.count + 1)

    @property
    def is_loop(self) -> bool:
        """Another start would most likely fail in the same way."""
        return self.count >= MAX_FAILURES


def failures_before(before: Status | None, *, restarted: bool) -> Failures:
    """Returns how earlier starts failed, where a launcher goes on starting by itself.

    Args:
        before: what the last start left.
        restarted: whether a launcher started this one by itself; a person has a reason to.

    Raises:
        CrashLoop: the launcher has tried often enough.
    """
    if before is None or not restarted or before.status not in ("running", "failed"):
        return Failures()
    failures = Failures(before.failed_at, before.failures)
    if before.status == "running":  # killed: nobody has counted that yet
        failures = failures.then(before.step)
    if failures.is_loop:
        reason = before.reason or "killed"
        raise CrashLoop(
            f"{failures.count} starts in a row came no further than step {failures.at} ({reason}), "
            "so this one does not try again. Mend the cause and start it by hand: that counts from "
            "1."
        )
    return failures
