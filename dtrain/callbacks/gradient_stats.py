"""Norms of gradients, layer by layer."""

from typing import Literal

import torch
from torch import Tensor

from dtrain.callback import Callback
from dtrain.callbacks.argument_checks import check_choice, check_counts
from dtrain.context import Context, Key, Step
from dtrain.distributed import copies_of, named_parameters, own_part


class GradientStats(Callback):
    """Logs the Euclidean norm of each layer's gradient as ``grad_norm/<layer>``.

    Gradients are those of the whole global batch, equal on all ranks and at every world size.
    Before ``ClipGradients`` in the list of callbacks it sees them unclipped, after it clipped.
    Norms cost no host sync, as they are not read before the next report.

    Args:
        every: compute them every so many global steps; a report has the mean of those since the
            last. At ``fit``'s ``log_every``, it has the norms of its last step.
        optimizer: of which of several optimizers, by its name or place; of all if None.
        per: a layer is a ``"parameter"``, or a ``"module"``: a direct child of the model.
    """

    asks_for_gradients = True

    def __init__(
        self,
        every: int = 50,
        *,
        per: Literal["parameter", "module"] = "parameter",
        optimizer: Key | None = None,
    ) -> None:
        check_counts("GradientStats", every=every)
        check_choice("GradientStats", "per", per, ("parameter", "module"))
        self._every = every
        self._per_module = per == "module"
        self._optimizer = optimizer
        if optimizer is not None:
            self.name = f"GradientStats({optimizer!r})"

    def on_fit_start(self, ctx: Context) -> None:
        ctx.optimizer_of(self._optimizer)  # there is one

    def on_grads_ready(self, ctx: Context, step: Step) -> None:
        if (step.number + 1) % self._every:
            return
        ctx.gradients()  # normalised and clipped from here on
        groups = ctx.optimizer_of(self._optimizer).param_groups
        mine = {id(p) for group in groups for p in group["params"]}
        every = self._optimizer is None
        named = [(n, p) for n, p in named_parameters(ctx.model) if every or id(p) in mine]
        found = {n: _numbers(p.grad) for n, p in named if p.grad is not None}
        if not found:
            return
        each = _norms([own_part(grad) for grad in found.values()])
        if ctx.sharded:  # those are of this rank's rows
            # Each row counts once, also where several replicas of the model hold it.
            copies = [copies_of(grad) for grad in found.values()]
            squares = torch.stack([n * n / k for n, k in zip(each, copies, strict=True)])
            each = [*ctx.comm.all_reduce("norms of gradients", squares).sqrt()]
        norms = dict(zip(found, each, strict=True))
        if self._per_module:
            by_module: dict[str, list[Tensor]] = {}
            for name, norm in norms.items():
                by_module.setdefault(name.partition(".")[0], []).append(norm)
            norms = {name: torch.stack(each).norm() for name, each in by_module.items()}
        for name, norm in norms.items():
            ctx.log(f"grad_norm/{name}", norm)


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Returns each tensor's norm, computed in 32 bits where it has fewer."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if double else torch.float32
    return list(torch._foreach_norm(tensors, 2, dtype=dtype))


def _numbers(grad: Tensor) -> Tensor:
    given = grad.coalesce().values() if grad.is_sparse else grad
    return torch.view_as_real(given.resolve_conj()) if given.is_complex() else given
