"""What of a run is on disk: whole, intact, and written by one start only."""

from dtrain.checkpoint.disk import discard, dtype_name, sync, write_bytes, write_tensors
from dtrain.checkpoint.fits import ALL_EPOCHS, BY_PLAN, MAX_STEPS, Fit, Fits, due_after_fit
from dtrain.checkpoint.format import Saved, load_plain, load_state
from dtrain.checkpoint.format import find as find_checkpoint
from dtrain.checkpoint.format import load_model as load_tensors
from dtrain.checkpoint.format import load_tensors as read_tensors
from dtrain.checkpoint.listing import RunLine, list_runs
from dtrain.checkpoint.one_folder import check_shared
from dtrain.checkpoint.resume import Asked, ResumeMode, compare_fits
from dtrain.checkpoint.run_files import RunFiles
from dtrain.checkpoint.run_state import CheckpointSlot, RunState, json_values
from dtrain.checkpoint.tree import copy_state, join, split
from dtrain.checkpoint.weights import Which, describe_run, export_model, load_model

__all__ = [
    "ALL_EPOCHS",
    "BY_PLAN",
    "MAX_STEPS",
    "Asked",
    "CheckpointSlot",
    "Fit",
    "Fits",
    "ResumeMode",
    "RunFiles",
    "RunLine",
    "RunState",
    "Saved",
    "Which",
    "check_shared",
    "compare_fits",
    "copy_state",
    "describe_run",
    "discard",
    "dtype_name",
    "due_after_fit",
    "export_model",
    "find_checkpoint",
    "join",
    "json_values",
    "list_runs",
    "load_model",
    "load_plain",
    "load_state",
    "load_tensors",
    "read_tensors",
    "split",
    "sync",
    "write_bytes",
    "write_tensors",
]
