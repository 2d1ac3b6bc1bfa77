"""Does a script's training survive being killed? It is killed, started again, and compared."""

from dtrain.trials.drill.drill import Drill, drill
from dtrain.trials.drill.report import Drilled

__all__ = ["Drill", "Drilled", "drill"]
