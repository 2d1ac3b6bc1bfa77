"""Blocks whose forward is compiled, each by itself: what sharding does around it is not."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dtrain.distributed import plain_name
from dtrain.errors import ConfigError


def check_compile(given: Any) -> dict[str, Any] | None:
    """Returns the arguments of torch.compile; None where nothing is to be compiled."""
    if isinstance(given, bool):
        return {} if given else None
    if isinstance(given, Mapping) and all(isinstance(key, str) for key in given):
        return dict(given)
    raise ConfigError(
        f"FSDP(compile={given!r}): True, or a dict of torch.compile's arguments, such as "
        "{'mode': 'max-autotune-no-cudagraphs'}"
    )


def compile_blocks(blocks: Mapping[str, nn.Module], options: dict[str, Any] | None) -> None:
    """Has blocks run a compiled forward; of one class, the same.

    Raises ConfigError where there is none, or one has a forward of its own.
    """
    if options is None:
        return
    if not blocks:
        raise ConfigError(
            "FSDP(compile=True) compiles the model's blocks, each by itself, and no repeated ones "
            "were found: pass FSDP(blocks=...), or leave compile out"
        )
    kinds: dict[type[nn.Module], type[nn.Module]] = {}
    for name, module in blocks.items():
        if "forward" in vars(module):
            raise ConfigError(
                f"FSDP(compile=True): {plain_name(name)} has a forward that is not its class's, "
                "which cannot be exchanged: leave compile out"
            )
        kind = type(module)
        if kind not in kinds:
            # Of the class: names in checkpoints stay, and hooks, FSDP's among them, are outside.
            forward = torch.compile(kind.forward, **options)
            body = {"forward": forward, "__module__": kind.__module__}
            kinds[kind] = type(kind.__name__, (kind,), body)
        module.__class__ = kinds[kind]
