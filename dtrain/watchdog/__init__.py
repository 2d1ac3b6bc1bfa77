"""No silent hang: where this rank is, where the others are, and which of them holds up all."""

from dtrain.watchdog.straggler import SECONDS_METRIC, StragglerClock
from dtrain.watchdog.watchdog import HANG_AFTER_S, Watchdog

__all__ = ["HANG_AFTER_S", "SECONDS_METRIC", "StragglerClock", "Watchdog"]
