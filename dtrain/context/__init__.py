"""What hooks and loss functions are handed, and what they hand back."""

from dtrain.context.context import Context
from dtrain.context.outbox import Outbox, Reduce, Request, Shown, check_name
from dtrain.context.step import Loss, Mean, Metrics, Number, Progress, Step, on_device

__all__ = [
    "Context",
    "Loss",
    "Mean",
    "Metrics",
    "Number",
    "Progress",
    "Request",
    "Step",
    "on_device",
]
__all__ += ["Outbox", "Reduce", "Shown", "check_name"]
