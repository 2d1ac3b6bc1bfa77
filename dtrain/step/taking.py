"""Model and optimizer as a Trainer takes them: looked at once, and made equal on all ranks."""

import gc
import sys
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dtrain import accelerator
from dtrain.context import Optimizers, as_one, has_updates
from dtrain.data import Data
from dtrain.distributed import (
    World,
    check_same_model,
    check_seeded,
    named_parameters,
    own_memory,
    some_of,
)
from dtrain.errors import ConfigError
from dtrain.step.parameters import lacking, note_of
from dtrain.step.strategy import Strategy

#: What else a model may come in, at the top or within: it meets other ranks by its own rules.
_WRAPPERS = (
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "DeepSpeedEngine",
)

_NO_OPTIMIZER = (
    "this Trainer was made without an optimizer, Trainer(model, None, ...), and so evaluates and "
    "predicts only: to train, pass one, or set trainer.optimizer"
)

_DYNAMO_WAS_THERE = "torch._dynamo" in sys.modules


@cache
def _let_go_of_frames() -> None:
    """Frees models that nobody uses, once in a process, after its first optimizer was made.

    That imports torch._dynamo, and what is left of the import holds the frames of all that called
    it, and so their models, until the garbage collector comes by.
    """
    if not _DYNAMO_WAS_THERE:
        gc.collect()


class NoOptimizer(Optimizer):
    """Stands where there is none, for a Trainer that evaluates and predicts only."""

    def __init__(self) -> None:
        super().__init__([{"params": []}], {})

    def step(self, closure: Any = None) -> Any:
        """Raises ConfigError."""
        raise ConfigError(_NO_OPTIMIZER)


def check_trains(model: nn.Module, optimizer: object) -> None:
    """Raises ConfigError where there is nothing to train, or nothing to train it with."""
    if isinstance(optimizer, NoOptimizer):
        raise ConfigError(_NO_OPTIMIZER)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("no parameter of the model requires a gradient: nothing to train")


def take_model(
    model: nn.Module,
    optimizer: Optimizers | None,
    strategy: Strategy,
    world: World,
) -> tuple[nn.Module, Optimizer, list[str]]:
    """Returns the model as it is trained, its optimizer, and what to tell the user of them.

    Ranks: all, communicates.
    """
    world.comm.mark_step(0)  # ranks may have left an earlier Trainer's fit in different steps
    if optimizer is None:
        optimizer = NoOptimizer()
    else:
        check_trains(model, optimizer)
    own_memory(model)
    model = strategy.prepare_model(strategy.bring(model, world), world)
    made = _made(optimizer, model)
    _let_go_of_frames()
    lacks = [] if isinstance(made, NoOptimizer) else lacking(made, model)
    notes = [note] if (note := note_of(lacks)) else []
    hooked = [name for name, p in named_parameters(model) if p._backward_hooks]
    if hooked and world.size > 1:
        notes.append(
            f"note: hooks on gradients ({some_of(hooked)}: register_hook) see those of their own "
            "rank, before these are summed. One that is not linear, as a clamp, makes other "
            "numbers than on one rank: do that in a callback's on_grads_ready (or ClipGradients)"
        )
    check_same_model(model, world.comm)
    if world.comm.vote("models differ", strategy.make_equal(model, world)):
        notes.append(
            "the ranks' models were not equal; all have rank 0's now. Call "
            "dtrain.init(seed=...) before the model is made, and they are equal from the start."
        )
    return model, made, notes + check_seeded(world)


def _made(given: Any, model: nn.Module) -> Any:
    """Returns the optimizer, made by the function if one is given; raises ConfigError if it cannot.

    It need not be one; see `_check_optimizer`.
    """
    kind = getattr(given, "func", given)  # a class, or a partial one
    if isinstance(kind, type) and issubclass(kind, Optimizer):
        raise ConfigError(
            f"the optimizer is {given!r}, which takes parameters, not a model: pass "
            f"`lambda m: {kind.__name__}(m.parameters(), ...)`"
        )
    made = given
    if callable(given) and not isinstance(given, Optimizer):
        try:
            made = given(model)
        except Exception as error:
            error.add_note(f"(while the optimizer was made: {given!r} was called with the model)")
            raise
    return as_one(made)


def unwrapped(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Returns the user's own module, and what to tell; raises ConfigError for what cannot be."""
    notes = []
    if isinstance(model, nn.parallel.DistributedDataParallel):
        # What the loss function calls by another way must not reduce gradients a second time.
        model.require_backward_grad_sync = model.require_forward_param_sync = False
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        kind = type(model).__name__
        notes = [
            f"the model came in {kind}: its module is trained without that, for dtrain reduces "
            "gradients itself. Pass Trainer(model.module), or leave it out"
        ]
        model = model.module
    for name, module in model.named_modules():
        if type(module).__name__ in _WRAPPERS:
            raise ConfigError(
                f"{name or 'the model'!r} is wrapped in {type(module).__name__}, which reduces "
                "gradients by itself, as dtrain does: pass the module without it (compiled or not)"
            )
    named = [*named_parameters(model, remove_duplicate=False), *model.named_buffers()]
    if lazy := [name for name, tensor in named if is_lazy(tensor)]:
        raise ConfigError(
            f"lazy layers do not know their shapes yet ({', '.join(lazy[:5])}), so ranks could not "
            "agree on them: run one batch through the model before the optimizer and the Trainer "
            "are made, on every rank: `with torch.no_grad(): model(x)`"
        )
    return model, notes


def takes_a_veto(optimizer: Optimizer) -> bool:
    """Says whether the optimizer can be told on the device to change nothing, as fused ones can."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def may_delay(device: torch.device, optimizer: Optimizer, data: Data) -> bool:
    """Says whether steps need not be waited for.

    The optimizer can be told on the device to change nothing, and which steps there are does not
    hang on what ranks say.
    """
    on_host = accelerator.of(device) is None
    together = takes_a_veto(optimizer) and not has_updates(optimizer)
    return not on_host and together and not data.is_stream
