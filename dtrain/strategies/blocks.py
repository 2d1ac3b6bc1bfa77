"""What of a model, and of its training, cannot be sharded."""

from collections.abc import Iterator

import torch
from torch import nn

from dtrain.context import kind_of, needs_closure, parts_of
from dtrain.distributed import is_sharded, named_parameters, plain_name, some_of
from dtrain.errors import ConfigError
from dtrain.step import MicroStep, own_class

#: Optimizers of torch's whose update is not element by element.
_WHOLE = ("Adafactor", "LBFGS", "Muon", "SparseAdam")


def words_of(blocks: dict[str, nn.Module]) -> str:
    """Returns in words what the blocks are."""
    kinds: dict[str, list[str]] = {}
    for name, module in blocks.items():
        kinds.setdefault(own_class(type(module)).__name__, []).append(name)
    told = [
        f"{len(names)} x {kind} ({names[0]}{' ... ' + names[-1] if len(names) > 1 else ''})"
        for kind, names in kinds.items()
    ]
    return ", ".join(told)


def check_model(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    """Raises ConfigError for what cannot be sharded."""
    if whys := [*_unsuited(model, blocks)]:
        raise ConfigError(f"strategy='fsdp' cannot train this model: {whys[0]}")


def check_training(micro_step: MicroStep) -> None:
    """Raises ConfigError for optimizers, precisions and captures that do not work with shards."""
    optimizer = micro_step.context.optimizer
    if micro_step.precision.scales_loss:
        raise ConfigError(
            "strategy='fsdp' does not work with a loss scale (fp16) yet: use "
            "MixedPrecision('bf16') or FSDP(params='bf16')"
        )
    if micro_step.update:
        raise ConfigError(
            "strategy='fsdp' works with one update in a step only: pass a list of optimizers, "
            "which are stepped together by one loss, or use 'ddp' or 'flat'"
        )
    parts = parts_of(optimizer).values()
    whole = [one for one in parts if needs_closure(one) or type(one).__name__ in _WHOLE]
    if whole:
        raise ConfigError(
            f"{kind_of(whole[0])} looks at whole parameters, or evaluates the loss again, which "
            "does not work with sharded ones: use AdamW, SGD or another whose update is element by "
            "element; or strategy='ddp'"
        )
    if micro_step.computed is not None:
        raise ConfigError("strategy='fsdp' cannot be captured: leave graph=True out")


def _unsuited(model: nn.Module, blocks: dict[str, nn.Module]) -> Iterator[str]:
    named = dict(named_parameters(model))
    if sharded := [name for name, p in named.items() if is_sharded(p)]:
        yield (
            f"{some_of(sharded)} are sharded already (DTensors), by another Trainer or the script: "
            "pass a new model, which dtrain shards itself"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            yield f"ranks wait for one another in {name or 'it'} (SyncBatchNorm). Use GroupNorm"
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            yield f"gradients of {name or 'it'} are sparse: pass sparse=False"
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            yield (
                f"{plain_name(name) or 'it'} is compiled, together with what sharding does "
                "around it: leave torch.compile out, and pass FSDP(compile=True)"
            )
        if getattr(module, "max_norm", None) is not None:
            yield (
                f"the forward of {name or 'it'} writes its parameters (max_norm), which would be "
                "lost: leave max_norm out, and bound all rows in on_step_end"
            )
        if isinstance(module, torch.jit.ScriptModule):
            yield f"{name or 'it'} is a ScriptModule: pass the module itself"
        if getattr(module, "parametrizations", None) is not None:
            yield f"{name or 'it'} is parametrized (torch.nn.utils.parametrize), not tried yet"
    if hooked := [n for n, p in named.items() if p._backward_hooks or _has_post_hooks(p)]:
        yield (
            f"hooks on gradients ({some_of(hooked)}: register_hook) would not see sharded ones: "
            "change gradients in a callback's on_grads_ready"
        )
    if points := [name for name, p in named.items() if p.dim() == 0]:
        yield f"{some_of(points)} have no dimension to shard: give them the shape [1]"
    if meta := [name for name, p in named.items() if p.is_meta]:
        yield f"{some_of(meta)} are on the meta device: make the model on a real one"
    kinds = {p.dtype for p in named.values()}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
        yield (
            f"its parameters are {', '.join(sorted(str(kind) for kind in kinds))}, and must be all "
            "float32 or all float64. For bfloat16, keep them in float32 and pass "
            "FSDP(params='bf16')"
        )
    if strange := [n for n, p in named.items() if not p.is_contiguous()]:
        yield f"{some_of(strange)} are not contiguous: call `.contiguous()` on their data"
    yield from _ties(model, blocks)


def _has_post_hooks(p: nn.Parameter) -> bool:
    return bool(p._post_accumulate_grad_hooks)


def _ties(model: nn.Module, blocks: dict[str, nn.Module]) -> Iterator[str]:
    homes: dict[int, dict[str, str]] = {}
    for name, p in named_parameters(model, remove_duplicate=False):
        within = [block for block in blocks if name.startswith(f"{plain_name(block)}.")]
        homes.setdefault(id(p), {})[max(within, key=len, default="")] = name
    for places in homes.values():
        if len(places) > 1:
            yield (
                f"{' and '.join(places.values())} are one parameter (tied), in several blocks: "
                "choose FSDP(blocks=...) so that they are in one, or untie them"
            )
