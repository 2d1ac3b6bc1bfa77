"""Tweaks of the training; one idea, one file."""

from dtrain.callbacks.checkpoint import Checkpoint
from dtrain.callbacks.clip_gradients import ClipGradients
from dtrain.callbacks.early_stopping import EarlyStopping
from dtrain.callbacks.gradient_accumulation import GradientAccumulation
from dtrain.callbacks.lr_schedule import LRSchedule
from dtrain.callbacks.mixed_precision import MixedPrecision

__all__ = [
    "Checkpoint",
    "ClipGradients",
    "EarlyStopping",
    "GradientAccumulation",
    "LRSchedule",
    "MixedPrecision",
]
