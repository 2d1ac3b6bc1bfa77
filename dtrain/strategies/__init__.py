"""How gradients of different ranks meet."""

from dtrain.strategies.base import Strategy
from dtrain.strategies.ddp import DDP

__all__ = ["DDP", "Strategy"]
