"""Words for what a function of torch's could not take, where torch names no shape or range."""

from contextlib import suppress
from traceback import walk_tb

from torch import Tensor

from dtrain.accelerator import is_lost


def explain(error: Exception) -> None:
    """Adds a note where one of torch's losses raised ``error``, or a table of embeddings did.

    And where sharded parameters were to be added to what is not.
    """
    if "got mixed torch.Tensor and DTensor" in str(error):
        error.add_note(
            "(with strategy='fsdp', parameters and their gradients are DTensors, of which this "
            "rank has rows: a penalty is for callbacks.L1L2Penalty, and a hook computes with "
            "`p.to_local()`, or with ctx.gradients())"
        )
    span = (lambda tensor: "") if is_lost(error) else _range  # which reads it
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") != "torch.nn.functional":
            continue  # a frame keeps the locals that it is asked for: in dtrain's own, the error
        name, values = frame.f_code.co_name, frame.f_locals
        given, target, table = (values.get(key) for key in ("input", "target", "weight"))
        if not isinstance(given, Tensor):
            continue
        if name.startswith("embedding") and isinstance(table, Tensor):
            rows = len(table)
            error.add_note(
                f"(F.{name}: the indices are {_form(given)}{span(given)}; the table has {rows} "
                f"rows, so they must be from 0 to {rows - 1})"
            )
        elif isinstance(target, Tensor):
            words = f"(F.{name}: the input is {_form(given)}, the target {_form(target)}"
            words += span(target)
            if name in ("cross_entropy", "nll_loss") and given.dim():
                classes = given.shape[min(given.dim(), 2) - 1]
                words += f"; class indices must be int64 from 0 to {classes - 1}"
                if name == "cross_entropy":
                    words += f", or else floats {list(given.shape)}"
            error.add_note(words + ")")
        else:
            continue
        return


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _range(tensor: Tensor) -> str:
    if tensor.numel():
        with suppress(RuntimeError):  # complex; or its device has failed
            return f" from {tensor.min().item():g} to {tensor.max().item():g}"
    return ""
