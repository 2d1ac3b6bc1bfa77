"""Weights alone, out of a checkpoint or a safetensors file, into a model or one plain file."""

import json
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dtrain.checkpoint import disk
from dtrain.checkpoint import format as files
from dtrain.checkpoint.status import read as read_status
from dtrain.checkpoint.stored import stored_in
from dtrain.distributed import load_named, named_parameters, named_state, plain_name
from dtrain.errors import CheckpointError, ConfigError
from dtrain.meta import Given, Unmade, not_made

_NAMED = 10

#: Which weights of a run, or of which step; see :func:`load_model`.
Which = Literal["final", "raw", "averaged", "best"] | int


def load_model(
    path: str | Path, model: nn.Module, *, strict: bool = True, which: Which = "final"
) -> Path:
    """Loads parameters and buffers into ``model``, and nothing else; for inference or fine-tuning.

    Nothing is unpickled. A checkpoint's files are compared with their checksums first, and the
    model is changed only once all of it is known to fit. Values take the model's own dtypes,
    devices and memory formats. Names are those of the model before it was compiled.

    Example::

        dtrain.load_model("runs/first", model)                          # what fit ended with
        dtrain.load_model("runs/first", model, which="best")
        dtrain.load_model("runs/first/checkpoints/step-00000500", model)
        dtrain.load_model("weights.safetensors", model, strict=False)

        with dtrain.meta_init():
            model = GPT(config)
        dtrain.load_model("pretrained", model)                          # read by the Trainer

    Args:
        path: a run's folder, of which the newest intact checkpoint is taken (newer, damaged ones
            are told of in a warning); or a checkpoint's folder; or a ``.safetensors`` file, or a
            folder with ``model.safetensors`` or its parts, as Hugging Face's libraries write it.
        model: a module, on any device; may be compiled, but not wrapped otherwise. Of one that is
            sharded each rank reads its rows; so it does of one of :func:`~dtrain.meta_init`, once
            a Trainer takes it: until then the files must stay as they are.
        strict: the names must be the model's, all of them, and so must the shapes. False loads
            those tensors that fit, and leaves the others of the model as they are.
        which: ``"final"``, the weights that count (docs/checkpoints.md): what the model held after
            ``fit``, such as ``EMA``'s averages. ``"raw"``: the model's own. ``"averaged"``: the
            newest averages. ``"best"``: those that were evaluated in the checkpoint that
            ``Checkpoint(best=...)`` calls best, or else what ``EarlyStopping`` kept. A number:
            those that count in the checkpoint of that global step.

    Returns:
        The file that was read; the checkpoint's folder, where it was several.

    Raises:
        CheckpointError: there is nothing intact to read, or it does not fit.
        ConfigError: ``which`` is none of these.

    Ranks: all, local; each reads the file.
    """
    file, found, averages = _read(*_choose(Path(path).expanduser(), which))
    own = {name: t for name, t in named_state(model).items() if isinstance(t, Tensor)}
    tied = {name: id(p) for name, p in named_parameters(model, remove_duplicate=False)}
    fitting = {name: t for name, t in found.items() if name in own and _fits(t, own[name])}
    # Of weights that are tied, a file may hold one only; it fills all of them.
    filled = {_memory(own[name], tied.get(name)) for name in fitting}
    troubles = {
        "missing in the file": [
            name
            for name, t in own.items()
            if name not in found and _memory(t, tied.get(name)) not in filled
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
    later = not_made(model, remove_duplicate=False)
    _defer(file, fitting, {n: p for n, p in later.items() if n in fitting}, averages)
    now = {name: t for name, t in fitting.items() if name not in later}
    load_named(model, now | _extra_state(file, model), strict=False)
    return file


def _defer(
    file: Path, found: dict[str, Tensor], later: dict[str, Unmade], averages: set[str]
) -> None:
    """Has parameters that are not made read what was found, once they are."""
    if not later:
        return
    every = files.stored_model(file) if file.is_dir() and files.has_manifest(file) else {}
    for one in () if every else [file] if file.is_file() else _plain_files(file):
        every |= {plain_name(name): stored for name, stored in stored_in(one).items()}
    which = _which_file(file)
    for name, p in later.items():
        # Averages have been cast, and are in memory.
        read = found[name].__getitem__ if name in averages else every[name].part
        p.recipe = Given(read, p.dtype, f"{which} {name}")


def _which_file(file: Path) -> str:
    """Returns what other files hardly have: of a checkpoint its manifest, else sizes and times."""
    if file.is_dir() and files.has_manifest(file):
        return str(files.read_manifest(file)["sha256"])
    found = [file] if file.is_file() else sorted(file.glob("*.safetensors"))
    return str([(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in found])


def export_model(path: str | Path, file: str | Path, *, which: Which = "final") -> int:
    """Writes the weights of a run as one plain safetensors file, which any tool can read.

    Example::

        dtrain.export_model("runs/first", "first.safetensors")

    Args:
        path: as for :func:`load_model`.
        file: what to write; it is there whole, or as it was.
        which: as for :func:`load_model`.

    Returns:
        How many tensors it holds.

    Raises:
        CheckpointError: there is nothing intact to read, or the file cannot be written.
        ConfigError: ``which`` is none of these.

    Ranks: rank 0 only.
    """
    file = Path(file).expanduser()
    _, tensors, _ = _read(*_choose(Path(path).expanduser(), which))
    aside = file.with_name(f".{file.name}.writing")
    try:
        with disk.plain_words(file):
            disk.write_tensors(aside, tensors)
            aside.replace(file)
            disk.sync(file.parent)
    finally:
        aside.unlink(missing_ok=True)
    return len(tensors)


def _extra_state(file: Path, model: nn.Module) -> dict[str, Any]:
    """Returns what the modules' ``get_extra_state`` gave, if ``file`` is a checkpoint's."""
    folder = file if file.is_dir() else file.parent
    extra = files.load_state(folder).get("extra", {}) if files.has_manifest(folder) else {}
    return {name: state for name, state in extra.items() if name in named_state(model)}


def describe_run(run_dir: Path) -> str:
    """Returns where a run stands, its checkpoints, and which weights count, in some lines.

    Raises CheckpointError where it has no checkpoint. Ranks: rank 0 only.
    """
    newest = _newest(run_dir)
    status, known = read_status(run_dir), files.whose_weights(newest)
    saved = files.listed(newest.parent)
    by = known["best_by"]
    best = files.best_of(saved, *by) if by else None
    lines = [f"{run_dir}: no status.json"]
    if status is not None:
        told = f"{run_dir}: {status.status}, step {status.step}, {status.epoch} epochs"
        lines = [told + f" ({status.reason})" * bool(status.reason)]
    for one in saved:
        figures = [f"{n} {v:.4g}" for n, v in one.metrics.items() if n.startswith("eval/")]
        marks = ["last"] * (one.path == newest)
        marks += [f"best by {by[0]} ({by[1]})"] if by and one == best else []
        lines.append("  ".join([f"  {one.path.name}", *figures, *marks]))
    whose = {which: name for which, (name, _) in known["whose"].items()}
    lines.append(f"the weights that count: {whose.get('final', 'the model')}'s, of {newest.name}")
    for which in ("averaged", "best"):
        if which in whose:
            lines.append(f"it holds also which={which!r}: {whose[which]}'s")
    return "\n".join(lines)


def _read(path: Path, which: str) -> tuple[Path, dict[str, Tensor], set[str]]:
    """Returns what was read, the tensors in it that count as ``which``, and which are averages."""
    if not path.is_dir() or not files.has_manifest(path):
        every = [path] if not path.is_dir() else _plain_files(path)
        loaded = [files.load_tensors(file).items() for file in every]
        return path, {plain_name(n): t for held in loaded for n, t in held}, set()
    own = files.load_model(path)
    held = {} if which == "raw" else files.load_held(path, which)
    if not held and which in ("averaged", "best"):
        raise CheckpointError(
            f"{path} holds no {which} weights: averaged are those of EMA or "
            "StochasticWeightAveraging; best those of Checkpoint(best=...), asked of the run's "
            "folder, or of EarlyStopping(restore_best=True)"
        )
    # In the model's dtypes: averages are kept in float32 at least. Copied: tied ones are one there.
    cast = {n: t.to(own[n].dtype if n in own else t.dtype, copy=True) for n, t in held.items()}
    return path if held else files.model_file(path), own | cast, set(cast)


def _choose(path: Path, which: Which) -> tuple[Path, str]:
    """Returns a file or checkpoint, compared with its checksums, and as what its weights count."""
    step = which if isinstance(which, int) and not isinstance(which, bool) else None
    if step is None and which not in get_args(get_args(Which)[0]):
        raise ConfigError(
            f"which={which!r}: 'final', 'raw', 'averaged', 'best', or the number of a step"
        )
    role = str(which) if step is None else "final"
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist: pass a run's folder, a checkpoint's, or a .safetensors file"
        )
    if not path.is_dir():
        return _file(path, role if step is None else ""), role
    if files.has_manifest(path):
        saved = files.check(path)
        if step not in (None, saved.step):
            raise CheckpointError(f"{path} is of step {saved.step}, not {step}")
        return path, role
    if _plain_files(path):
        if role not in ("final", "raw") or step is not None:
            raise CheckpointError(f"{path} has one set of weights, and no steps: leave which out")
        return path, role
    if step is not None:
        there = files.listed(_folder(path))
        found = [one.path for one in there if one.step == step]
        if not found:
            steps = ", ".join(str(one.step) for one in there) or "none"
            raise CheckpointError(f"{path} has no checkpoint of step {step}; there are: {steps}")
        return files.check(found[0]).path, role
    newest = _newest(path)
    by = files.whose_weights(newest)["best_by"] if which == "best" else None
    if by is None:
        return newest, role
    best = files.best_of(files.listed(newest.parent), *by)
    if best is None:
        raise CheckpointError(f"no checkpoint in {newest.parent} has {by[0]}, so none is the best")
    return files.check(best.path).path, "evaluated"


def _file(path: Path, role: str) -> Path:
    """Returns a file, if it holds what is asked for; warns where others count in its checkpoint."""
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is no .safetensors file. Other files of weights hold pickles, which may "
            "run any code, and are not read: write them with safetensors.torch.save_model"
        )
    if role not in ("final", "raw"):
        raise CheckpointError(f"{path} is one file, with one set of weights: pass a run's folder")
    if files.has_manifest(path.parent):
        files.check(path.parent)
        whose = files.whose_weights(path.parent)["whose"]
        if role == "final" and "final" in whose:
            warnings.warn(
                f"{path} holds the model's own weights, and those of {whose['final'][0]} count: "
                "pass the folder for these, or which='raw'",
                stacklevel=4,
            )
    return path


def _plain_files(path: Path) -> list[Path]:
    """Returns the files of weights in a folder that is neither a run's nor a checkpoint's."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if (path / f"{files.STATE}.json").exists():
        return []  # a checkpoint, without its manifest
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    with disk.plain_words(index, "cannot be read", CheckpointError, *disk.DAMAGE):
        names = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
        if any("/" in name for name in names):
            raise ValueError("a file outside of its folder")
    return [path / name for name in sorted(names)]


def _folder(path: Path) -> Path:
    inner = path / "checkpoints"
    return inner if inner.is_dir() else path


def _newest(path: Path) -> Path:
    """Returns the newest intact checkpoint of a run."""
    folder = _folder(path)
    saved, damage = files.find(folder)
    told = "".join(f"\n  {what}" for what in damage)
    if saved is None:
        raise CheckpointError(f"no intact checkpoint is in {folder}" + told)
    if damage:
        what = f"{saved.path} is loaded, because what is newer is damaged:{told}"
        warnings.warn(what, stacklevel=4)
    return saved.path


def _fits(there: Tensor, here: Tensor) -> bool:
    # A lazy layer takes the shape that it is given.
    return is_lazy(here) or (there.shape == here.shape and torch.can_cast(there.dtype, here.dtype))


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def _memory(tensor: Tensor, parameter: int | None) -> object:
    """What tied weights have in common; an empty tensor has nothing in common with others."""
    if tensor.is_meta:
        return parameter
    if is_lazy(tensor) or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _enumerate(names: list[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
