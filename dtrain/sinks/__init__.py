"""Where a run's figures go: one destination, one file. All of them run on rank 0 only."""

from dtrain.sinks.console import Console
from dtrain.sinks.json_lines import JSONLines

__all__ = ["Console", "JSONLines"]
