"""Weights alone, out of a checkpoint or a safetensors file, into a model or one plain file."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from dtrain.checkpoint import disk
from dtrain.checkpoint import format as files
from dtrain.errors import CheckpointError

_NAMED = 10


def load_model(path: str | Path, model: nn.Module, *, strict: bool = True) -> Path:
    """Loads parameters and buffers into ``model``, and nothing else; for inference or fine-tuning.

    Nothing is unpickled. A checkpoint's files are compared with their checksums first, and the
    model is changed only once all of it is known to fit. Values take the model's own dtypes,
    devices and memory formats.

    Example::

        dtrain.load_model("runs/first", model)                              # its newest checkpoint
        dtrain.load_model("runs/first/checkpoints/step-00000500", model)
        dtrain.load_model("weights.safetensors", model, strict=False)

    Args:
        path: a run's folder, of which the newest intact checkpoint is taken (newer, damaged ones
            are told of in a warning); or a checkpoint's folder; or a ``.safetensors`` file.
        model: a module, on any device; not a wrapped one.
        strict: the names must be the model's, all of them, and so must the shapes. False loads
            those tensors that fit, and leaves the others of the model as they are.

    Returns:
        The file that was read; the checkpoint's folder, where its model is in parts.

    Raises:
        CheckpointError: there is nothing intact to read, or it does not fit.

    Ranks: all, local; each reads the file.
    """
    file = _find(Path(path).expanduser())
    found = _read(file)
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    fitting = {name: t for name, t in found.items() if name in own and _fits(t, own[name])}
    # Of weights that are tied, a file may hold one only; it fills all of them.
    filled = {_memory(own[name]) for name in fitting}
    troubles = {
        "missing in the file": [
            name for name, t in own.items() if name not in found and _memory(t) not in filled
        ],
        "unexpected, for the model has none of that name": [n for n in found if n not in own],
        "of another shape or kind": [
            f"{name} is {_describe(found[name])} there, {_describe(own[name])} in the model"
            for name in found
            if name in own and name not in fitting
        ],
    }
    if not fitting or (strict and any(troubles.values())):
        complaints = [f"  {what}: {_enumerate(n)}" for what, n in troubles.items() if n]
        advice = "make the model as it was when it was saved"
        if fitting:
            advice += ", or pass strict=False to load only what fits"
        raise CheckpointError(
            f"{file} does not fit the model ({len(fitting)} of the model's {len(own)} tensors do; "
            "nothing was loaded):\n" + "\n".join(complaints) + f"\nWhat to do: {advice}."
        )
    model.load_state_dict(fitting, strict=False)
    return file


def export_model(path: str | Path, file: str | Path) -> int:
    """Writes the weights of a run as one plain safetensors file, which any tool can read.

    Example::

        dtrain.export_model("runs/first", "first.safetensors")

    Args:
        path: as for :func:`load_model`.
        file: what to write; it is there whole, or as it was.

    Returns:
        How many tensors it holds.

    Raises:
        CheckpointError: there is nothing intact to read, or the file cannot be written.

    Ranks: rank 0 only.
    """
    file = Path(file).expanduser()
    tensors = _read(_find(Path(path).expanduser()))
    aside = file.with_name(f".{file.name}.writing")
    try:
        with disk.plain_words(file):
            disk.write_tensors(aside, tensors)
            aside.replace(file)
            disk.sync(file.parent)
    finally:
        aside.unlink(missing_ok=True)
    return len(tensors)


def _read(file: Path) -> dict[str, Tensor]:
    return files.load_model(file) if file.is_dir() else files.load_tensors(file)


def _find(path: Path) -> Path:
    """Returns the file or checkpoint, once it was compared with its checksums, if it has any."""
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: pass a run's folder, a checkpoint's, or a .safetensors file"
        )
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path} is no .safetensors file. Other files of weights hold pickles, which may "
                "run any code, and are not read: write them with safetensors.torch.save_model"
            )
        if files.has_manifest(path.parent):
            files.check(path.parent)
        return path
    if files.has_manifest(path):
        return files.model_file(files.check(path).path)
    inner = path / "checkpoints"
    folder = inner if inner.is_dir() else path
    saved, damage = files.find(folder)
    told = "".join(f"\n  {what}" for what in damage)
    if saved is None:
        raise CheckpointError(f"no intact checkpoint is in {folder}" + told)
    if damage:
        what = f"{saved.path} is loaded, because what is newer is damaged:{told}"
        warnings.warn(what, stacklevel=3)
    return files.model_file(saved.path)


def _fits(there: Tensor, here: Tensor) -> bool:
    return there.shape == here.shape and torch.can_cast(there.dtype, here.dtype)


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def _memory(tensor: Tensor) -> object:
    """What tied weights have in common; an empty tensor has nothing in common with others."""
    if tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _enumerate(names: list[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
