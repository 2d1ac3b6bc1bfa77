"""Gradient clipping, after unscaling, once an optimizer step."""

import torch
from torch import Tensor

from dtrain.callback import Callback
from dtrain.context import Context, Key, Step
from dtrain.distributed import copies_of, own_part
from dtrain.errors import ConfigError
from dtrain.step import joint_norm


class ClipGradients(Callback):
    """Bounds the gradient of the whole global batch, by norm or value by value.

    With ``max_norm``, all gradients are multiplied by ``max_norm / norm`` where their joint
    Euclidean norm is larger (Pascanu et al., "On the difficulty of training recurrent neural
    networks", ICML 2013). The norm is logged as ``grad_norm`` without a host sync.

    Args:
        max_norm: largest joint norm.
        max_value: largest absolute value of each entry; a complex one keeps its direction. One
            of the two must be given.
        optimizer: of which of several optimizers, by its name or place; of all if None, with one
            norm where they are stepped together. Its norm is logged as ``grad_norm/<optimizer>``.
    """

    asks_for_gradients = True

    def __init__(
        self,
        max_norm: float | None = None,
        *,
        max_value: float | None = None,
        optimizer: Key | None = None,
    ) -> None:
        if (max_norm is None) == (max_value is None):
            raise ConfigError("ClipGradients: give max_norm or max_value, one of them")
        if not (max_norm or max_value or 0) > 0:
            raise ConfigError(
                f"ClipGradients(max_norm={max_norm}, max_value={max_value}): must be more than 0"
            )
        self._max_norm = max_norm
        self._max_value = max_value
        self._optimizer = optimizer
        if optimizer is not None:
            self.name = f"ClipGradients({optimizer!r})"

    def on_fit_start(self, ctx: Context) -> None:
        ctx.optimizer_of(self._optimizer)  # there is one

    def on_grads_ready(self, ctx: Context, step: Step) -> None:
        key = self._optimizer
        if step.update and key not in (None, step.update):
            return
        if self._max_value is not None:
            for grad in ctx.gradients(key):
                _clamp(grad, self._max_value)
        elif self._max_norm is not None and (step.update or key is None):
            name = f"grad_norm/{step.update}" if step.update else "grad_norm"
            ctx.log(name, ctx.clip_gradient_norm(self._max_norm))
        elif self._max_norm is not None:  # some of those that are stepped together
            grads = ctx.gradients(key)
            norm = _norm_of_rows(ctx, key) if ctx.sharded else joint_norm(grads)
            ctx.log(f"grad_norm/{key}", norm)
            torch._foreach_mul_(grads, (self._max_norm / (norm + 1e-6)).clamp(max=1.0))


def _norm_of_rows(ctx: Context, key: Key | None) -> Tensor:
    """Returns the norm over all ranks, of which each holds rows. Ranks: all, communicates."""
    groups = ctx.optimizer_of(key).param_groups
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    # Each row counts once, also where several replicas of the model hold it.
    squares = [joint_norm([own_part(grad)]).double().square() / copies_of(grad) for grad in grads]
    norm = ctx.comm.all_reduce("norm of gradients", torch.stack(squares).sum()).sqrt()
    return norm.to(grads[0].dtype)


def _clamp(grad: Tensor, largest: float) -> None:
    if grad.is_sparse:
        whole = grad.coalesce()  # an entry may be in it several times
        _clamp(whole.values(), largest)
        grad.copy_(whole)
    elif grad.is_complex():
        grad.mul_((largest / grad.abs()).clamp(max=1.0))
    else:
        grad.clamp_(-largest, largest)
