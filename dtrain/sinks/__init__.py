"""Where figures go; one destination, one file.

TensorBoard and WandB import their packages when they are opened, not before.
"""

from dtrain.sinks.console import Console
from dtrain.sinks.csv_file import CSV
from dtrain.sinks.json_lines import JSONLines
from dtrain.sinks.tensorboard import TensorBoard
from dtrain.sinks.wandb import WandB

__all__ = ["CSV", "Console", "JSONLines", "TensorBoard", "WandB"]
