"""dtrain: a small training loop for PyTorch that behaves on a thousand ranks as on one."""

from dtrain.callback import Callback
from dtrain.checkpoint import export_model, load_model
from dtrain.context import Context, Loss, Mean, Progress, Step
from dtrain.data import Data
from dtrain.distributed import World, init, on_main
from dtrain.errors import DtrainError
from dtrain.sinks import Report, Sink
from dtrain.trainer import FitResult, Trainer
from dtrain.trials import Equivalence, check_equivalence

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "Context",
    "Data",
    "DtrainError",
    "Equivalence",
    "FitResult",
    "Loss",
    "Mean",
    "Progress",
    "Report",
    "Sink",
    "Step",
    "Trainer",
    "World",
    "check_equivalence",
    "export_model",
    "init",
    "load_model",
    "on_main",
]
