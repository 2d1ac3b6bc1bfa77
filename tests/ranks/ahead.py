"""Has the loop run ahead, as on a GPU, for which the CPU stands in; or wait for each step."""

import pytest
from stand_in import StandIn

import dtrain.trainer
from dtrain import accelerator

_REAL = accelerator.of


def run_ahead(ahead: bool = True, patch: pytest.MonkeyPatch | None = None) -> None:
    """From here on; without a ``patch`` to undo it, to the end of the process."""
    patch = patch or pytest.MonkeyPatch()
    if ahead:
        StandIn().install(patch)
    else:
        patch.setattr(accelerator, "of", _REAL)
    patch.setattr(dtrain.trainer, "may_delay", lambda device, optimizer, data: ahead)
