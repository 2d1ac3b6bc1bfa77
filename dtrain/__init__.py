"""dtrain: a small training loop for PyTorch that behaves on a thousand ranks as on one."""

from dtrain.callback import Callback, Sink
from dtrain.data import Data
from dtrain.equivalence import Equivalence, check_equivalence
from dtrain.errors import DtrainError
from dtrain.state import Context, Loss, Mean, Progress, Report, Step
from dtrain.trainer import FitResult, Trainer
from dtrain.weights import export_model, load_model
from dtrain.world import World, init, on_main

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
