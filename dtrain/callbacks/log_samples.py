"""Shows what the model makes of a few samples: texts and pictures, at evaluations."""

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from torch import Tensor

from dtrain.callback import Callback
from dtrain.context import Context, Step
from dtrain.distributed import current, init
from dtrain.errors import ConfigError


class LogSamples(Callback):
    """Hands texts and pictures of an evaluation's first micro-batch to the sinks and to files.

    What the function returns goes to the sinks that can show it, and into
    ``run_dir/samples/step-.../``: a text as ``<name>.txt``, a picture as ``<name>.png``. It is
    asked once an evaluation in ``fit`` (of several sets: in the first), and not where rank 0 had no
    data.
    Example: ``LogSamples(lambda outputs, batch: {"first answer": tokenizer.decode(outputs[0])})``.

    Args:
        fn: from ``Loss(outputs=...)`` and the micro-batch to a dict from name to text or picture:
            an array or tensor of 8-bit values, ``[height, width]`` or ``[height, width, 3]``.
        every: at each evaluation (``"eval"``), or at every so many, from the first on.

    Ranks: all, local; ``fn`` runs on rank 0 only.
    """

    def __init__(
        self, fn: Callable[[Any, Any], Mapping[str, Any]], *, every: int | Literal["eval"] = "eval"
    ) -> None:
        if not callable(fn):
            raise ConfigError(f"LogSamples({fn!r}): must be a function of (outputs, batch)")
        if every != "eval" and (isinstance(every, bool | str) or every < 1):
            raise ConfigError(f"LogSamples(every={every!r}): 'eval', or a number from 1 up")
        self._fn = fn
        self._every = 1 if every == "eval" else every
        self._evaluations = 0
        self._due = False

    def on_eval_start(self, ctx: Context) -> None:
        if not ctx.in_fit:
            return
        is_main = (current() or init()).is_main
        self._due = is_main and self._evaluations % self._every == 0
        self._evaluations += 1

    def on_eval_batch(self, ctx: Context, step: Step) -> None:
        if not self._due or step.loss is None:
            return
        self._due = False
        shown = self._fn(step.loss.outputs, step.batch)
        if not isinstance(shown, Mapping):
            raise ConfigError(f"LogSamples: fn returned {type(shown).__name__}, not a dict")
        for name, value in shown.items():
            if isinstance(value, str):
                ctx.show(name, text=value)
                _keep(ctx, f"{name}.txt", value.encode())
            else:
                image = _as_image(name, value)
                ctx.show(name, image=image)
                _keep(ctx, f"{name}.png", _png(image))

    def on_eval_end(self, ctx: Context, metrics: dict[str, float]) -> None:
        self._due = False  # rank 0 may have had no data

    def state_dict(self) -> dict[str, Any]:
        return {"evaluations": self._evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._evaluations = state["evaluations"]


def _keep(ctx: Context, name: str, data: bytes) -> None:
    if ctx.run_dir is not None:
        folder = ctx.run_dir / "samples" / f"step-{ctx.progress.step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / quote(name, safe=" ")).write_bytes(data)  # a "/" must not make another folder


def _as_image(name: str, value: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    image = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    if image.dtype != np.uint8 or not fits or not image.size:
        raise ConfigError(
            f"LogSamples: {name!r} is {image.dtype} of shape {list(image.shape)}; a picture is "
            "uint8 of shape [height, width] or [height, width, 3]. From floats of shape "
            "[3, height, width] in 0 to 1: (x * 255).clamp(0, 255).byte().permute(1, 2, 0)"
        )
    return image


def _png(image: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """Returns a PNG file (W3C, 2003, sections 5 and 9), whatever else is installed."""
    height, width = image.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in image)  # filter 0: as it is
    colour_type = 0 if image.ndim == 2 else 2
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        png += struct.pack(">I", len(data)) + kind + data
        png += struct.pack(">I", zlib.crc32(kind + data))
    return png
