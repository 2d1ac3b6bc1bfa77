"""Puts into each rank's rows what parameters of ``dtrain.meta_init()`` become."""

from collections.abc import Mapping

import torch
from torch import nn

from dtrain.accelerator import give_back_heap
from dtrain.distributed import Comm, digest_of, fill_own_part, named_parameters, some_of
from dtrain.errors import ConfigError, RankMismatch
from dtrain.meta import Recipe


def check_alike(recipes: Mapping[str, Recipe], comm: Comm) -> None:
    """Raises RankMismatch where ranks would make other weights. Ranks: all, communicates."""
    if not comm.vote("models to make", bool(recipes)):
        return
    marks = {name: digest_of(recipe.mark()) for name, recipe in recipes.items()}
    apart = _apart(marks, comm)
    if apart:  # files of other times, as copies on each host are, may hold the same
        held = {name: recipes[name].digest() for name in apart if name in recipes}
        apart = _apart(held, comm)
    if apart:
        raise RankMismatch(
            f"the ranks would make other weights, each for its own rows: {some_of(apart)}. Call "
            "dtrain.init(seed=...) before dtrain.meta_init(), draw alike on all ranks, and load "
            "the same files"
        )


def _apart(marks: Mapping[str, str], comm: Comm) -> list[str]:
    by_rank = comm.gather_objects("what is to be made, by name", dict(marks))
    names = dict.fromkeys(name for one in by_rank for name in one)
    return [name for name in names if len({one.get(name) for one in by_rank}) > 1]


@torch.no_grad()
def fill(model: nn.Module, recipes: Mapping[str, Recipe]) -> None:
    """Makes one parameter after the other, of which this rank keeps its part. Ranks: all, local."""
    for name, p in named_parameters(model):
        if name not in recipes:
            continue
        try:
            fill_own_part(p, recipes[name].part)
        except ConfigError as error:
            error.add_note(f"(while {name} was made)")
            raise
        give_back_heap()
