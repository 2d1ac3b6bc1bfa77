"""Where figures go; one destination, one file.

TensorBoard and WandB import their packages when they are opened, not before.
"""

from dtrain.sinks.console import Console
from dtrain.sinks.csv_file import CSV
from dtrain.sinks.dispatcher import Dispatcher
from dtrain.sinks.history import History, describe_end, describe_start
from dtrain.sinks.journal import Journal
from dtrain.sinks.json_lines import JSONLines
from dtrain.sinks.sink import FIGURES, Report, Sink
from dtrain.sinks.tensorboard import TensorBoard
from dtrain.sinks.wandb import WandB

__all__ = [
    "CSV",
    "FIGURES",
    "Console",
    "Dispatcher",
    "History",
    "JSONLines",
    "Journal",
    "Report",
    "Sink",
    "TensorBoard",
    "WandB",
    "describe_end",
    "describe_start",
]
