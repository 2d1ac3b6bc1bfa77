"""Tweaks of the training; one idea, one file.

Each raises ConfigError where an argument is off, DataError where it can make nothing of a batch.

Example::

    callbacks = [MixedPrecision("bf16"), ClipGradients(1.0), EMA(decay=0.9999), Checkpoint(keep=5)]
    Trainer(model, optimizer, loss_fn, callbacks=callbacks)

Ranks: all, local, where a callback does not say otherwise. Parameters and gradients are equal on
all ranks, and so is what becomes of them.
"""

from dtrain.callbacks.checkpoint import Checkpoint
from dtrain.callbacks.checkpoint_activations import CheckpointActivations
from dtrain.callbacks.clip_gradients import ClipGradients
from dtrain.callbacks.early_stopping import EarlyStopping
from dtrain.callbacks.ema import EMA
from dtrain.callbacks.eval_outputs import EvalOutputs
from dtrain.callbacks.freeze import Freeze
from dtrain.callbacks.gradient_accumulation import GradientAccumulation
from dtrain.callbacks.gradient_noise import GradientNoise
from dtrain.callbacks.gradient_stats import GradientStats
from dtrain.callbacks.l1_l2_penalty import L1L2Penalty
from dtrain.callbacks.label_smoothing import LabelSmoothing
from dtrain.callbacks.log_samples import LogSamples
from dtrain.callbacks.loss_spike_guard import LossSpikeGuard
from dtrain.callbacks.lr_schedule import LRSchedule
from dtrain.callbacks.mixed_precision import MixedPrecision
from dtrain.callbacks.mixup import Mixup
from dtrain.callbacks.non_finite_guard import NonFiniteGuard
from dtrain.callbacks.overfit_batches import OverfitBatches
from dtrain.callbacks.param_schedule import ParamSchedule
from dtrain.callbacks.profile import Profile
from dtrain.callbacks.stochastic_weight_averaging import StochasticWeightAveraging
from dtrain.callbacks.targets import hard_labels
from dtrain.callbacks.throughput import Throughput
from dtrain.callbacks.time_limit import TimeLimit

__all__ = [
    "EMA",
    "Checkpoint",
    "CheckpointActivations",
    "ClipGradients",
    "EarlyStopping",
    "EvalOutputs",
    "Freeze",
    "GradientAccumulation",
    "GradientNoise",
    "GradientStats",
    "L1L2Penalty",
    "LRSchedule",
    "LabelSmoothing",
    "LogSamples",
    "LossSpikeGuard",
    "MixedPrecision",
    "Mixup",
    "NonFiniteGuard",
    "OverfitBatches",
    "ParamSchedule",
    "Profile",
    "StochasticWeightAveraging",
    "Throughput",
    "TimeLimit",
    "hard_labels",
]
