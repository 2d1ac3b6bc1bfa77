"""Writes a run's figures, settings and samples for TensorBoard."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dtrain.sinks.sink import FIGURES, OnError, Report, Sink, check_package, place_in


class TensorBoard(Sink):
    """Writes event files into the run's folder: scalars, hyper-parameters, texts and pictures.

    Hyper-parameters are ``Trainer(config=...)``, nested names joined with dots. Samples come from
    ``ctx.show``. Look at them with ``tensorboard --logdir runs``. A run that is continued adds a
    file; TensorBoard hides figures of steps that are now taken again.

    Args:
        folder: the folder's name, within the run's folder.
        on_error: ``"raise"`` ends the run if it cannot be written; see :class:`~dtrain.Sink`.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str = "tensorboard", *, on_error: OnError = "warn") -> None:
        check_package("tensorboard", sink="TensorBoard")
        self.folder = folder
        self.files = [folder]
        self.on_error = on_error
        self._begin: Any = None
        self._writer: Any = None
        self._session_end: Any = None

    def open(self, run_dir: Path | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, where it may raise

        path = place_in(run_dir, f"{self.folder}/", sink="TensorBoard")
        path.mkdir(parents=True, exist_ok=True)
        self._begin = partial(SummaryWriter, str(path))

    def write(self, report: Report) -> None:
        if self._begin is None:
            raise RuntimeError("TensorBoard.write() was called before open()")
        step, sample = report.step, report.sample
        if self._writer is None:  # what is said while the run starts comes before `start`
            # Of an earlier start, TensorBoard hides what is from `purge_step` on. A run that begins
            # writes step 0 again; one that is continued does not repeat the step it goes on from.
            self._writer = self._begin(purge_step=step + 1 if step else 0)
        if report.kind == "start" and report.config:
            self._write_config(report)
        elif report.kind in FIGURES:
            for name, value in report.values.items():
                self._writer.add_scalar(name, value, step)
        elif sample is not None:
            if sample.image is not None:
                form = "HW" if sample.image.ndim == 2 else "HWC"
                self._writer.add_image(sample.name, sample.image, step, dataformats=form)
            if sample.text:
                self._writer.add_text(sample.name, sample.text, step)
        elif report.kind == "end" and self._session_end is not None:
            self._writer.file_writer.add_summary(self._session_end)
        self._writer.flush()

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _write_config(self, report: Report) -> None:
        from torch.utils.tensorboard.summary import hparams

        # As SummaryWriter.add_hparams does, but without its second folder.
        experiment, begin, self._session_end = hparams(
            _flat(report.config), {"train/loss": 0.0, "eval/loss": 0.0}
        )
        self._writer.file_writer.add_summary(experiment)
        self._writer.file_writer.add_summary(begin)
        text = json.dumps(dict(report.config), indent=1)
        self._writer.add_text("config", f"```json\n{text}\n```", report.step)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | float | str]:
    """Returns nested settings under joined names; what is no number or text becomes text."""
    flat: dict[str, bool | float | str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            flat[prefix + name] = value if plain else json.dumps(value)
    return flat
