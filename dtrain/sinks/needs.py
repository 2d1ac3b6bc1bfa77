"""What a sink cannot do without: a folder, or a package."""

import importlib.util
from pathlib import Path

from dtrain.errors import ConfigError


def place_in(run_dir: Path | None, name: str, *, sink: str) -> Path:
    """Returns where ``name`` is in the run's folder.

    Raises:
        ConfigError: the run has none.

    Ranks: rank 0 only.
    """
    if run_dir is None:
        raise ConfigError(
            f"{sink} writes {name} into the run's folder, and this run has none: name one with "
            'Trainer(run_dir="runs/first"), or remove the sink'
        )
    return run_dir / name


def check_package(name: str, *, sink: str) -> None:
    """Looks for a package that is imported on rank 0 later, in ``open``: it takes a second.

    Raises:
        ConfigError: it is not installed.

    Ranks: all, local.
    """
    # A mere folder of that name in the current one, as wandb makes, has no origin.
    if getattr(importlib.util.find_spec(name), "origin", None) is None:
        raise ConfigError(f"{sink} needs the package {name}: pip install dtrain[{name}]")
