"""What dtrain asks of an accelerator, and what its errors mean.

Callers write ``accelerator.of(device)``, so that a test can put something in its place.
"""

from dtrain.accelerator.cuda import Accelerator, let_go, of
from dtrain.accelerator.faults import give_up, is_lost, is_out_of_memory, is_this_ranks
from dtrain.accelerator.heap import give_back_heap

__all__ = ["Accelerator", "give_back_heap", "give_up", "is_lost", "is_out_of_memory"]
__all__ += ["is_this_ranks", "let_go", "of"]
