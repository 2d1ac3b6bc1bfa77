"""What FSDP(...) can be told, checked when it is made."""

from dataclasses import dataclass
from typing import Any

import torch

from dtrain.errors import ConfigError
from dtrain.step import Blocks
from dtrain.strategies.compiling import check_compile

_DTYPES = {None: None, "bf16": torch.bfloat16, torch.bfloat16: torch.bfloat16}
_REDUCES = (None, "float32", torch.float32)


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
        if not isinstance(self.offload, bool):
            raise ConfigError(f"FSDP(offload={self.offload!r}): True or False")
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
        if self.tensor > 1 and (set_ := [name for name in beside if getattr(self, name)]):
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
