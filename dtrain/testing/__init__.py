"""Test your training and your callbacks on many ranks: as threads, and as real processes."""

from dtrain.testing.outcomes import Outcome, RanksFailed
from dtrain.testing.processes import run_outcomes, run_processes
from dtrain.testing.threads import run_ranks, try_ranks
from dtrain.testing.turns import aside

__all__ = [
    "Outcome",
    "RanksFailed",
    "aside",
    "run_outcomes",
    "run_processes",
    "run_ranks",
    "try_ranks",
]
