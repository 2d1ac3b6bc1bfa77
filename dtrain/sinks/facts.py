"""Where a run computes, and with what: for whoever reads about it later."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dtrain.distributed import World


def facts_of(world: World, hooks: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Returns JSON values; ``hooks`` are the callbacks' names by hook, in their order.

    Nothing of the environment's variables or of the script's arguments: they may hold secrets.

    Ranks: all, local.
    """
    device = world.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "hooks": {hook: list(names) for hook, names in hooks.items()},
        "environment": {
            "ranks": world.size,
            "device": kind,
            "backend": world.backend,
            "launcher": world.launcher,
            "rank 0's host": world.host,
            "script": Path(sys.argv[0]).name if sys.argv else "",
            "dtrain": _version("dtrain"),
            "torch": torch.__version__,
            "Python": platform.python_version(),
            "system": platform.platform(),
            "cores": os.cpu_count() or 0,
            "threads of a rank": torch.get_num_threads(),
        },
    }


@cache  # it is looked for on the disk
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # it is used from a folder, and not installed
        return "not installed"
