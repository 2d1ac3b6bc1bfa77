"""How gradients of different ranks meet."""

from dtrain.step import Strategy
from dtrain.strategies.ddp import DDP
from dtrain.strategies.flat import Flat, choose

__all__ = ["DDP", "Flat", "Strategy", "choose"]
