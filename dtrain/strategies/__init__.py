"""How gradients of different ranks meet."""

from dtrain.step import Strategy
from dtrain.strategies.ddp import DDP
from dtrain.strategies.flat import Flat, choose
from dtrain.strategies.fsdp import FSDP

__all__ = ["DDP", "FSDP", "Flat", "Strategy", "choose"]
