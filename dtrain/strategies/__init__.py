"""How gradients of different ranks meet."""

from dtrain.step import Strategy
from dtrain.strategies.accelerate_config import from_accelerate_config
from dtrain.strategies.ddp import DDP
from dtrain.strategies.flat import Flat, choose
from dtrain.strategies.fsdp import FSDP

__all__ = ["DDP", "FSDP", "Flat", "Strategy", "choose", "from_accelerate_config"]
