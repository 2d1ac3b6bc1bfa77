"""What is looked at before a step is taken, so that nobody learns of it an hour later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dtrain.distributed import Comm, digest_of
from dtrain.errors import ConfigError, RankMismatch
from dtrain.loop import Plan

Shapes = list[tuple[str, list[int], str]]


def shapes_of(model: nn.Module) -> Shapes:
    """Returns name, shape and dtype of each parameter and buffer."""
    return [(name, list(t.shape), str(t.dtype)) for name, t in model.state_dict().items()]


def check_config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the user's settings as a dict of JSON values.

    Raises:
        ConfigError: they are not.

    Ranks: all, local.
    """
    try:
        # Through JSON and back: what is kept is what can be read again.
        values: object = json.loads(json.dumps(config if config is not None else {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Trainer(config=...) must hold JSON values only: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"Trainer(config=...) must be a dict, not {type(config).__name__}")
    return values


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


def check_same_model(model: nn.Module, comm: Comm) -> None:
    """Raises where the ranks' models differ in names, shapes, dtypes or what is frozen.

    Raises:
        RankMismatch: with what differs, by rank.

    Ranks: all, communicates.
    """
    shapes = shapes_of(model)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if len(set(comm.gather_objects("model", digest_of([*shapes, frozen])))) == 1:
        return
    mine = [f"{name} {shape} {dtype}" for name, shape, dtype in shapes]
    mine += [f"{name} (frozen)" for name in frozen]
    described = comm.gather_objects("models", mine)
    rows = []
    for rank, lines in enumerate(described):
        extra = [line for line in lines if line not in described[0]]
        lacking = [line for line in described[0] if line not in lines]
        words = [f"has {', '.join(extra[:5])}"] * bool(extra)
        words += [f"lacks {', '.join(lacking[:5])}"] * bool(lacking)
        rows.append(f"  rank {rank}: {'; '.join(words) or 'as rank 0'}")
    raise RankMismatch(
        "the ranks have different models (compared with rank 0):\n" + "\n".join(rows)
    )


def check_same_call(arguments: Mapping[str, object], comm: Comm) -> None:
    """Raises where the ranks called ``fit`` with different arguments or unequal data.

    Raises:
        RankMismatch: with every rank's.

    Ranks: all, communicates.
    """
    everyones = comm.gather_objects("fit", {name: str(value) for name, value in arguments.items()})
    differing = [n for n in arguments if len({one.get(n) for one in everyones}) > 1]
    if differing:
        table = "\n".join(
            f"  rank {rank}: " + ", ".join(f"{name}: {one.get(name)}" for name in differing)
            for rank, one in enumerate(everyones)
        )
        raise RankMismatch(
            f"the ranks called fit with different arguments or data of different length:\n{table}"
        )


def check_plan(
    epochs: int | None,
    max_steps: int | None,
    eval_every: int | str | None,
    log_every: int,
    eval_first: bool,
) -> Plan:
    """Returns the plan that ``fit``'s arguments make.

    Raises:
        ConfigError: an argument is out of range, or nothing says how long to train.

    Ranks: all, local.
    """
    if epochs is None and max_steps is None:
        raise ConfigError("how long? pass epochs, max_steps, or both (the first reached counts)")
    for name, value in (("epochs", epochs), ("max_steps", max_steps), ("log_every", log_every)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and value >= 1):
            raise ConfigError(f"{name}={value!r}: must be a whole number of 1 or more")
    by_steps = isinstance(eval_every, int) and not isinstance(eval_every, bool) and eval_every >= 1
    if not (eval_every is None or eval_every == "epoch" or by_steps):
        raise ConfigError(f"eval_every={eval_every!r}: 'epoch', a number of steps, or None")
    return Plan(epochs, max_steps, eval_every, log_every, eval_first)
