"""What hooks and loss functions are handed, and what they hand back."""

from dtrain.context.context import Context
from dtrain.context.numbers import on_device
from dtrain.context.outbox import Outbox, Reduce, Shown
from dtrain.context.progress import Progress
from dtrain.context.request import Request
from dtrain.context.step import Step
from dtrain.context.values import Loss, Mean, Number

__all__ = [
    "Context",
    "Loss",
    "Mean",
    "Number",
    "Outbox",
    "Progress",
    "Reduce",
    "Request",
    "Shown",
    "Step",
    "on_device",
]
