"""The term of a rank that has nothing to say."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Idle(torch.autograd.Function):
    """Zero forward; backward gives each parameter a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, sparse: frozenset[int], *params: Tensor) -> Tensor:
        ctx.sparse = sparse
        ctx.params = params
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(
            _no_rows(p) if place in ctx.sparse else torch.zeros_like(p)
            for place, p in enumerate(ctx.params)
        )


def _no_rows(table: Tensor) -> Tensor:
    """A sparse zero of the form that an embedding's gradient has: sparse in its rows only."""
    rows = torch.zeros((1, 0), dtype=torch.long, device=table.device)
    values = table.new_zeros((0, *table.shape[1:]))
    return torch.sparse_coo_tensor(rows, values, table.shape, check_invariants=True)


def idle(params: Sequence[nn.Parameter], sparse: Collection[Tensor] = ()) -> Tensor:
    """Returns a zero that takes part in a reduction of ``params`` and changes nothing.

    Zeros are given outright: ``0 * p.sum()`` would turn an infinite parameter into NaN. Those of
    ``sparse`` parameters are sparse, as an embedding's gradient may be.
    """
    known = set(map(id, sparse))
    places = frozenset(place for place, p in enumerate(params) if id(p) in known)
    zero: Tensor = _Idle.apply(places, *params)  # type: ignore[no-untyped-call]
    return zero
