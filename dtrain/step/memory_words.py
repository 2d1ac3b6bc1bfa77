"""Words for what did not fit into memory: what was under way, and which of dtrain's knobs help."""

from contextlib import suppress
from typing import Protocol

import torch

from dtrain.accelerator import is_out_of_memory
from dtrain.callback import Hooks
from dtrain.context import Context, Step
from dtrain.data import AccumulationSlot, tensors_of
from dtrain.distributed import UPDATE
from dtrain.step.precision import Precision


class _Parts(Protocol):
    context: Context
    hooks: Hooks
    precision: Precision


_BEGINS = "(out of memory in "


def explain_memory(
    error: BaseException,
    where: str,
    step: Step | None,
    of: _Parts,
    *,
    trains: bool = True,
) -> None:
    """Adds a note, once, where ``error`` means that there was no memory for this ``step``."""
    context, precision = of.context, of.precision
    notes = getattr(error, "__notes__", ())
    if not is_out_of_memory(error) or any(note.startswith(_BEGINS) for note in notes):
        return
    words = f"{_BEGINS}{where} at step {context.progress.step}"
    samples = 0
    if step is not None and step.batch is not None:
        kind = "micro-batch" if trains else f"batch {step.number}, micro-batch"
        forms = [f"{str(t.dtype)[6:]} {list(t.shape)}" for t in tensors_of(step.batch)]
        words += f", {kind} {step.micro + 1} of {step.micros}, of {step.samples} samples"
        words += f" ({', '.join(forms[:8])}{', ...' * (len(forms) > 8)})" if forms else ""
        samples = step.samples
    words += _figures(context.device)
    if where == UPDATE.name:
        helps = ["fewer parameters that are trained (Freeze)", "an optimizer that keeps less"]
    else:
        accumulates = any(isinstance(one, AccumulationSlot) for one in of.hooks.callbacks)
        helps = [] if accumulates or samples == 1 else [_ACCUMULATION]
        wide = any(p.dtype in (torch.float32, torch.float64) for p in context.model.parameters())
        helps += ['MixedPrecision("bf16")'] * (type(precision) is Precision and wide)
        helps += [_CHECKPOINTING] * (trains and not _checkpoints(error, context.model))
    error.add_note(f"{words}. What helps: {'; '.join(helps) or 'smaller batches'})")


_ACCUMULATION = (
    "GradientAccumulation(steps=2), the same training in micro-batches of half as many samples "
    "(an iterable's own batches: make them smaller as well)"
)
_CHECKPOINTING = (
    "activation checkpointing: callbacks.CheckpointActivations(), which computes blocks again in "
    "backward instead of keeping what is in them"
)


def _figures(device: torch.device) -> str:
    """Says what is taken on a card; torch keeps no count of the CPU's."""
    if device.type != "cuda":
        return ""
    with suppress(RuntimeError):
        now, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        gib = [f"{one / 2**30:.3g}" for one in (now, most, free, total)]
        return (
            f"; this process has {gib[0]} GiB allocated on {device} and had at most {gib[1]}, and "
            f"{gib[2]} of {gib[3]} GiB are free there"
        )
    return ""


def _checkpoints(error: BaseException, model: torch.nn.Module) -> bool:
    """Says whether activations are computed again already, as far as that can be seen."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        trace = trace.tb_next
    # As Hugging Face's models, timm's, and torch's own wrapper say it.
    return any(
        getattr(part, "gradient_checkpointing", False) is True
        or getattr(part, "grad_checkpointing", False) is True
        or type(part).__name__ == "CheckpointWrapper"
        for part in model.modules()
    )
