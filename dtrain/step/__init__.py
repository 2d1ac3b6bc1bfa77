"""One step of training: what a rank does with a micro-batch, and how ranks agree on it."""

from dtrain.step.blocks import Blocks, blocks_of, own_class
from dtrain.step.engine import Engine
from dtrain.step.lane import Heard, LaneSilent
from dtrain.step.loss_forms import LossFn, UserLoss, adapt, as_loss
from dtrain.step.micro_step import MicroStep, of_backward
from dtrain.step.precision import Autocast, Factor, Precision, PrecisionSlot, ScaledAutocast
from dtrain.step.recomputing import recompute
from dtrain.step.strategy import StepResult, Strategy, joint_norm
from dtrain.step.taking import check_trains, may_delay, take_model, unwrapped
from dtrain.step.updates import UpdatePlan
from dtrain.step.votes import Agreed

__all__ = [
    "Agreed",
    "Autocast",
    "Blocks",
    "Engine",
    "Factor",
    "Heard",
    "LaneSilent",
    "LossFn",
    "MicroStep",
    "Precision",
    "PrecisionSlot",
    "ScaledAutocast",
    "StepResult",
    "Strategy",
    "UpdatePlan",
    "UserLoss",
    "adapt",
    "as_loss",
    "blocks_of",
    "check_trains",
    "joint_norm",
    "may_delay",
    "of_backward",
    "own_class",
    "recompute",
    "take_model",
    "unwrapped",
]
