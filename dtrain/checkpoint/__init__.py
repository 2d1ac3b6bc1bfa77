"""What of a run is on disk: whole, intact, and written by one start only."""

from dtrain.checkpoint.format import Saved
from dtrain.checkpoint.run_files import RunFiles
from dtrain.checkpoint.run_lock import RunLock
from dtrain.checkpoint.run_state import RunState
from dtrain.checkpoint.saver import Saver
from dtrain.checkpoint.slot import CheckpointSlot
from dtrain.checkpoint.status import Failures, ResumeMode, Status
from dtrain.checkpoint.tree import copy_state
from dtrain.checkpoint.weights import export_model, load_model

__all__ = [
    "CheckpointSlot",
    "Failures",
    "ResumeMode",
    "RunFiles",
    "RunLock",
    "RunState",
    "Saved",
    "Saver",
    "Status",
    "copy_state",
    "export_model",
    "load_model",
]
