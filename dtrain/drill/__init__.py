"""Does a script's training survive being killed? It is killed, started again, and compared."""

from dtrain.drill.drill import Drill, drill
from dtrain.drill.report import Drilled

__all__ = ["Drill", "Drilled", "drill"]
