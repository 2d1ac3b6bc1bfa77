"""How gradients of different ranks meet."""

from dtrain.step import Strategy
from dtrain.strategies.auto import choose
from dtrain.strategies.ddp import DDP
from dtrain.strategies.flat import Flat

__all__ = ["DDP", "Flat", "Strategy", "choose"]
