"""The fits of a run: how long each is, which of them a call of ``fit`` is, and what it returns."""

from dtrain.plan.phases import Phases
from dtrain.plan.plan import FitResult, Plan, Recorder

__all__ = ["FitResult", "Phases", "Plan", "Recorder"]
