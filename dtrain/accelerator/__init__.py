"""What dtrain asks of an accelerator, and of nothing else in torch.

Callers write ``accelerator.of(device)``, so that a test can put something in its place.
"""

from dtrain.accelerator.cuda import Accelerator, of

__all__ = ["Accelerator", "of"]
