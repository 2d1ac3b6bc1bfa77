"""Does a script's training give the same numbers on any number of ranks? And if not, why?"""

from dtrain.trials.equivalence.check import check_equivalence
from dtrain.trials.equivalence.compare import Comparison, Parted
from dtrain.trials.equivalence.report import Cause, Equivalence

__all__ = ["Cause", "Comparison", "Equivalence", "Parted", "check_equivalence"]
