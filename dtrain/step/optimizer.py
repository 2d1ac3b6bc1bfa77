"""The user's model and optimizer: made ready, looked at, and made equal on all ranks."""

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from dtrain.distributed import World, check_same_model
from dtrain.errors import ConfigError
from dtrain.step.strategy import Strategy


def _check_optimizer(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """Returns what to tell the user of it; raises ConfigError where it is of another model."""
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


def take_model(
    model: nn.Module,
    optimizer: Optimizer | Callable[[nn.Module], Optimizer],
    strategy: Strategy,
    world: World,
) -> tuple[nn.Module, Optimizer, list[str]]:
    """Returns the model as it is trained, its optimizer, and what to tell the user of them.

    Ranks: all, communicates.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("no parameter of the model requires a gradient: nothing to train")
    model = strategy.prepare_model(model.to(world.device), world)
    made = optimizer if isinstance(optimizer, Optimizer) else optimizer(model)
    notes = _check_optimizer(made, model)
    check_same_model(model, world.comm)
    if world.comm.vote("models differ", strategy.make_equal(model, world)):
        notes.append(
            "the ranks' models were not equal; all have rank 0's now. Call "
            "dtrain.init(seed=...) before the model is made, and they are equal from the start."
        )
    return model, made, notes


def takes_a_veto(optimizer: Optimizer) -> bool:
    """Says whether the optimizer can be told on the device to change nothing, as fused ones can."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
