"""Which strategy a model gets that was asked for none."""

from torch import nn

from dtrain.errors import ConfigError
from dtrain.step import Strategy
from dtrain.strategies.ddp import DDP
from dtrain.strategies.flat import Flat, unsuited

#: The size of one of DDP's buckets: below, it has nothing to overlap with backward. Where gradients
#: are larger, it may; on one rank, flat is quicker (docs/numbers.md).
FLAT_UP_TO_BYTES = 25 * 2**20


def choose(strategy: str | Strategy, model: nn.Module) -> Strategy:
    """Returns the strategy of that name; for ``"auto"``, the one that is quicker for the model."""
    if isinstance(strategy, Strategy):
        return strategy
    if strategy == "auto":
        size = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        return Flat() if size <= FLAT_UP_TO_BYTES and not unsuited(model) else DDP()
    if strategy == "flat":
        return Flat()
    if strategy == "ddp":
        return DDP()
    raise ConfigError(
        f"strategy={strategy!r}: choose 'auto', 'flat' or 'ddp', or pass a "
        "dtrain.strategies.Strategy"
    )
