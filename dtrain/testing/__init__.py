"""Test your training and your callbacks on real ranks."""

from dtrain.testing.processes import Outcome, RanksFailed, run_outcomes, run_processes

__all__ = ["Outcome", "RanksFailed", "run_outcomes", "run_processes"]
