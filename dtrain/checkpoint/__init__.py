"""What of a run is on disk: whole, intact, and written by one start only."""

from dtrain.checkpoint.disk import discard, sync, write
from dtrain.checkpoint.format import find as find_checkpoint
from dtrain.checkpoint.format import load_model as load_tensors
from dtrain.checkpoint.format import load_state
from dtrain.checkpoint.resume import ResumeMode, compare_fits
from dtrain.checkpoint.run_files import RunFiles
from dtrain.checkpoint.run_state import CheckpointSlot, RunState, json_values
from dtrain.checkpoint.tree import copy_state
from dtrain.checkpoint.weights import Which, describe_run, export_model, load_model

__all__ = [
    "CheckpointSlot",
    "ResumeMode",
    "RunFiles",
    "RunState",
    "Which",
    "compare_fits",
    "copy_state",
    "describe_run",
    "discard",
    "export_model",
    "find_checkpoint",
    "json_values",
    "load_model",
    "load_state",
    "load_tensors",
    "sync",
    "write",
]
