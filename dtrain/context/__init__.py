"""What hooks and loss functions are handed, and what they hand back."""

from dtrain.context.context import Context
from dtrain.context.optimizers import (
    Key,
    Optimizers,
    Several,
    Together,
    WithClosure,
    as_one,
    has_updates,
    kind_of,
    kinds_of_groups,
    needs_closure,
    parts_of,
)
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
__all__ += ["Key", "Optimizers", "Together", "as_one", "kind_of", "kinds_of_groups"]
__all__ += ["Several", "WithClosure", "has_updates", "needs_closure", "parts_of"]
__all__ += ["Outbox", "Reduce", "Shown", "check_name"]
