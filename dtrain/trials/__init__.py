"""A user's script, run as others would run it: `dtrain check` and `dtrain drill`."""

from dtrain.trials.commands import check_equivalence, drill_script
from dtrain.trials.report import Drilled, Equivalence, TrialReport

__all__ = ["Drilled", "Equivalence", "TrialReport", "check_equivalence", "drill_script"]
