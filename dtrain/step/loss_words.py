"""Words for what a loss function of torch's could not take, where torch names no shape or range."""

from contextlib import suppress
from traceback import walk_tb

from torch import Tensor


def explain(error: Exception) -> None:
    """Adds a note on input and target, where ``error`` was raised in one of torch's losses."""
    for frame, _ in walk_tb(error.__traceback__):
        given, target = frame.f_locals.get("input"), frame.f_locals.get("target")
        of_torch = frame.f_globals.get("__name__") == "torch.nn.functional"
        if not (of_torch and isinstance(given, Tensor) and isinstance(target, Tensor)):
            continue
        name = frame.f_code.co_name
        words = f"(F.{name}: the input is {_form(given)}, the target {_form(target)}"
        if target.numel():
            with suppress(
                RuntimeError, NotImplementedError
            ):  # complex, or a device that has failed
                words += f" from {target.min().item():g} to {target.max().item():g}"
        if name in ("cross_entropy", "nll_loss") and given.dim():
            classes = given.shape[min(given.dim(), 2) - 1]
            words += f"; class indices must be int64 from 0 to {classes - 1}"
            if name == "cross_entropy":
                words += f", or else floats {list(given.shape)}"
        error.add_note(words + ")")
        return


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
