"""What users name as ``dtrain.Trainer`` and so on."""

# Rooms that users name: `dtrain.callbacks.EMA` after a mere `import dtrain`.
from dtrain import callbacks as callbacks
from dtrain import data as data
from dtrain import schedules as schedules
from dtrain import sinks as sinks
from dtrain import strategies as strategies
from dtrain import testing as testing
from dtrain.callback import Callback
from dtrain.checkpoint import ResumeMode, export_model, load_model
from dtrain.context import (
    Context,
    Loss,
    Mean,
    Metrics,
    Number,
    Progress,
    Reduce,
    Request,
    Shown,
    Step,
    WithClosure,
)
from dtrain.data import Data
from dtrain.distributed import Comm, World, init, on_main
from dtrain.errors import (
    CheckError,
    CheckpointError,
    CommError,
    ConfigError,
    CrashLoop,
    DataError,
    DtrainError,
    HangError,
    LaunchError,
    LossError,
    RankMismatch,
    RemoteError,
    ResumeError,
    RunTaken,
    SinkError,
    UnusedParameters,
)
from dtrain.inference import load_predictions
from dtrain.meta import meta_init
from dtrain.plan import FitResult
from dtrain.sinks import Report, Sink
from dtrain.studies import Table, compare_runs
from dtrain.trainer import Trainer
from dtrain.trials import Equivalence, Study, ablate, check_equivalence
from dtrain.tuning import LRRange, find_batch_size, lr_range_test

__all__ = [
    "Callback",
    "CheckError",
    "CheckpointError",
    "Comm",
    "CommError",
    "ConfigError",
    "Context",
    "CrashLoop",
    "Data",
    "DataError",
    "DtrainError",
    "Equivalence",
    "FitResult",
    "HangError",
    "LRRange",
    "LaunchError",
    "Loss",
    "LossError",
    "Mean",
    "Metrics",
    "Number",
    "Progress",
    "RankMismatch",
    "Reduce",
    "RemoteError",
    "Report",
    "Request",
    "ResumeError",
    "ResumeMode",
    "RunTaken",
    "Shown",
    "Sink",
    "SinkError",
    "Step",
    "Study",
    "Table",
    "Trainer",
    "UnusedParameters",
    "WithClosure",
    "World",
    "ablate",
    "check_equivalence",
    "compare_runs",
    "export_model",
    "find_batch_size",
    "init",
    "load_model",
    "load_predictions",
    "lr_range_test",
    "meta_init",
    "on_main",
]
