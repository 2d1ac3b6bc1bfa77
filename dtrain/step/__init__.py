"""One step of training: what a rank does with a micro-batch, and how ranks agree on it."""

from dtrain.step.engine import Engine, take_model, takes_a_veto, unwrapped
from dtrain.step.lane import Heard, LaneSilent
from dtrain.step.micro_step import MicroStep, UserLoss, adapt, as_loss, of_backward
from dtrain.step.precision import Autocast, Factor, Precision, PrecisionSlot, ScaledAutocast
from dtrain.step.strategy import StepResult, Strategy, joint_norm
from dtrain.step.votes import Agreed

__all__ = [
    "Agreed",
    "Autocast",
    "Engine",
    "Factor",
    "Heard",
    "LaneSilent",
    "MicroStep",
    "Precision",
    "PrecisionSlot",
    "ScaledAutocast",
    "StepResult",
    "Strategy",
    "UserLoss",
    "adapt",
    "as_loss",
    "joint_norm",
    "of_backward",
    "take_model",
    "takes_a_veto",
    "unwrapped",
]
