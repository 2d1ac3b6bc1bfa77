"""What FSDP(...) can be told, checked when it is made."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dtrain.errors import ConfigError
from dtrain.step import Blocks, recompute
from dtrain.strategies.compiling import check_compile, compile_blocks

_NEEDS = (2, 13)
_DTYPES = {None: None, "bf16": torch.bfloat16, torch.bfloat16: torch.bfloat16}
_REDUCES = (None, "float32", torch.float32)


def check_torch() -> None:
    """Raises ConfigError where torch is too old for FSDP. Ranks: all, local."""
    found = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if found < _NEEDS:
        raise ConfigError(
            f"strategy='fsdp' needs torch 2.13 or newer, for what frees a step that failed in "
            f"the middle; this is {torch.__version__}"
        )


@dataclass(frozen=True)
class Options:
    """The arguments of FSDP, by their names there.

    Raises:
        ConfigError: one has a value that it cannot have.

    Ranks: all, local.
    """

    blocks: Blocks | None
    reshard: bool
    params: Any
    reduce: Any
    compile: Any = False
    offload: bool = False
    checkpoint_activations: bool = False
    replicas: Any = None
    tensor: int = 1
    plan: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.reshard, bool):
            raise ConfigError(
                f"FSDP(reshard={self.reshard!r}): True or False; a number is not supported, for a "
                "rank that sits a step out would have to hand on what it let go of. To keep "
                "gathers within a host: FSDP(replicas='hosts')"
            )
        if self.params not in _DTYPES:
            raise ConfigError(
                f"FSDP(params={self.params!r}): 'bf16', or None for their own precision"
            )
        if self.reduce not in _REDUCES:
            raise ConfigError(
                f"FSDP(reduce={self.reduce!r}): 'float32'. What ranks tell one another travels "
                "with the gradients, and below float32 it would be rounded"
            )

        check_compile(self.compile)
        for name in ("offload", "checkpoint_activations"):
            if not isinstance(value := vars(self)[name], bool):
                raise ConfigError(f"FSDP({name}={value!r}): True or False")
        is_number = type(self.replicas) is int and self.replicas > 0
        if not is_number and self.replicas not in (None, "hosts"):
            raise ConfigError(
                f"FSDP(replicas={self.replicas!r}): 'hosts' for one on each host, how many there "
                "are to be, or None for one over all ranks"
            )
        if type(self.tensor) is not int or self.tensor < 1:
            raise ConfigError(f"FSDP(tensor={self.tensor!r}): how many ranks, or 1")
        if self.plan is not None and self.tensor == 1:
            raise ConfigError("FSDP(plan=...) says how to slice: pass tensor=2 (ranks), too")
        beside = ("replicas", "params", "compile", "offload")
        if self.tensor > 1 and (set_ := [name for name in beside if vars(self)[name]]):
            raise ConfigError(f"FSDP(tensor=...) does not work with {set_[0]} yet: leave one out")

    def check_world(self, size: int) -> None:
        """Raises ConfigError where one rank alone cannot do what several can."""
        if size == 1 and self.dtype is not None:
            raise ConfigError(
                "FSDP(params='bf16') casts what is gathered, and one rank gathers nothing: leave "
                "it out here, or use MixedPrecision('bf16')"
            )
        if size == 1 and self.tensor > 1:
            raise ConfigError("FSDP(tensor=...) needs several ranks: leave it out on one")

    @property
    def dtype(self) -> torch.dtype | None:
        """What parameters are gathered in; None for their own."""
        return _DTYPES[self.params]

    def apply(self, model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        """Changes how a model's blocks run; raises ConfigError where they cannot."""
        compile_blocks(blocks, check_compile(self.compile))
        if self.checkpoint_activations:
            recompute(model, blocks, "FSDP(checkpoint_activations=True)")

    def words(self) -> str:
        """Returns what is done with blocks, for the start block."""
        told = {
            "computed in bf16, summed in float32": self.dtype is not None,
            "blocks compiled": check_compile(self.compile) is not None,
            "blocks computed again in backward": self.checkpoint_activations,
            "offloaded to the host, where they are anyway": self.offload,
        }
        return "".join(f"; {words}" for words, holds in told.items() if holds)
