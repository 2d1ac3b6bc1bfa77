"""A user's script, run as others would run it: `dtrain check` and `dtrain drill`."""

from dtrain.trials.drill import Drill, drill
from dtrain.trials.equivalence import Equivalence, check_equivalence

__all__ = ["Drill", "Equivalence", "check_equivalence", "drill"]
