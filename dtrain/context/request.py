"""What a callback asks of the run."""

from dtrain.errors import ConfigError


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
