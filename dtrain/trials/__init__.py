"""A user's script, run as others would run it: `dtrain check` and `dtrain drill`."""

from dtrain.trials.check import check_equivalence
from dtrain.trials.check_report import Equivalence
from dtrain.trials.drill import drill_script
from dtrain.trials.drill_report import Drilled
from dtrain.trials.report import TrialReport

__all__ = ["Drilled", "Equivalence", "TrialReport", "check_equivalence", "drill_script"]
