"""Test your training and your callbacks on many ranks: as threads, and as real processes."""

from dtrain.testing.faults import Delay, Fault, Kill, Raise, Signal, Stop
from dtrain.testing.outcomes import Outcome, RanksFailed
from dtrain.testing.processes import rank_environment, run_outcomes, run_processes
from dtrain.testing.threads import run_ranks, try_ranks
from dtrain.testing.tiny import TinyFit, tiny_fit
from dtrain.testing.turns import aside

__all__ = [
    "Delay",
    "Fault",
    "Kill",
    "Outcome",
    "Raise",
    "RanksFailed",
    "Signal",
    "Stop",
    "TinyFit",
    "aside",
    "rank_environment",
    "run_outcomes",
    "run_processes",
    "run_ranks",
    "tiny_fit",
    "try_ranks",
]
