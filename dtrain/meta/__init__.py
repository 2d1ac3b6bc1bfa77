"""Models whose parameters take no memory until a Trainer takes them."""

from dtrain.meta.recording import meta_init
from dtrain.meta.unmade import (
    Given,
    Recipe,
    Unmade,
    check_made,
    make,
    move_made,
    not_made,
    open_places,
    place,
)

__all__ = [
    "Given",
    "Recipe",
    "Unmade",
    "check_made",
    "make",
    "meta_init",
    "move_made",
    "not_made",
    "open_places",
    "place",
]
