"""What the user's optimizer must be, and what it can be told."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from dtrain.errors import ConfigError


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Returns what to tell the user of the optimizer.

    Raises:
        ConfigError: it holds parameters that are not the model's.

    Ranks: all, local.
    """
    ours = {id(p) for p in model.parameters()}
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"the optimizer is {optimizer!r}, no torch.optim.Optimizer")
    held = [p for group in optimizer.param_groups for p in group["params"]]
    strange = [p for p in held if id(p) not in ours]
    if strange:
        shapes = ", ".join(str(list(p.shape)) for p in strange[:5])
        raise ConfigError(
            f"{len(strange)} of the optimizer's {len(held)} parameters are not the model's (shapes "
            f"{shapes}). Make the optimizer from this model, after its last change; or pass a "
            "function: Trainer(model, lambda m: AdamW(m.parameters()), ...)"
        )
    ids = {id(p) for p in held}
    left = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ids]
    if not left:
        return []
    shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
    return [f"note: the optimizer does not have {shown}, which require a gradient"]


def takes_a_veto(optimizer: Optimizer) -> bool:
    """Says whether the optimizer can be told on the device to change nothing, as fused ones can."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
