"""dtrain: a small training loop for PyTorch that behaves on a thousand ranks as on one."""

import atexit
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dtrain.api import *  # noqa: F403
else:  # hidden from type checkers, which would take any name for one

    def __getattr__(name: str) -> Any:
        """Imports ``dtrain.api``, and torch with it, when one of its names is first asked for.

        Not before: the ``dtrain`` command starts processes that need as long for that as it does.
        """
        if not name.startswith("__") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")  # a room, which may be on its way to be one
        if name == "__all__" or not name.startswith("__"):
            api = import_module("dtrain.api")  # half made where it is what asks: it imports more
            if name not in globals() and hasattr(api, name):
                globals()[name] = getattr(api, name)
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@atexit.register  # here: what a script or a library registers later is called before
def _leave() -> None:
    """Ends a process that has lost its device; see ``dtrain.accelerator``."""
    if faults := sys.modules.get("dtrain.accelerator.faults"):
        faults.leave()


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("dtrain.api").__all__})
