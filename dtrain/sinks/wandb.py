"""Sends a run's figures, settings and samples to Weights & Biases."""

import html
import secrets
from pathlib import Path
from typing import Any, Literal

from dtrain.sinks.sink import FIGURES, OnError, Report, Sink, check_package


class WandB(Sink):
    """Logs scalars, the Trainer's ``config``, texts and pictures to a wandb run.

    Figures have ``step`` (global steps) as their x axis. Samples come from ``ctx.show``. wandb
    keeps its files in the run's folder, too. A run that is continued goes on in the same wandb run,
    whose id is kept in ``run_dir/wandb-id.txt``. wandb takes nothing back: steps that are taken
    again are there twice. A run that failed or was killed is marked as such.

    Example::

        Trainer(model, optimizer, loss_fn, sinks=[Console(), WandB("digits")], run_dir="runs/first")

    Args:
        project: wandb's project.
        name: the run's name there; wandb makes one up if None.
        mode: ``"online"``, ``"offline"`` or ``"disabled"``; wandb's own settings decide if None.
        on_error: ``"raise"`` ends the run if wandb fails; see :class:`~dtrain.Sink`.
        **init: more arguments of ``wandb.init``, such as ``entity`` or ``tags``.

    Raises:
        ConfigError: the package wandb is not installed.
    """

    def __init__(
        self,
        project: str,
        name: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        *,
        on_error: OnError = "warn",
        **init: Any,
    ) -> None:
        check_package("wandb", sink="WandB")
        self.on_error = on_error
        self._init = {"project": project, "name": name, "mode": mode, "resume": "allow", **init}
        self._run: Any = None

    def open(self, run_dir: Path | None) -> None:
        import wandb

        place: dict[str, Any] = {}
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
            kept = run_dir / "wandb-id.txt"
            if not kept.exists():
                kept.write_text(self._init.get("id") or secrets.token_hex(4))
            place = {"dir": str(run_dir), "id": kept.read_text().strip()}
        self._ended = False
        self._wandb: Any = wandb
        self._run = wandb.init(**{**place, **self._init})
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, report: Report) -> None:
        if self._run is None:
            raise RuntimeError("WandB.write() was called before open()")
        if report.kind == "start":
            self._run.config.update(dict(report.config), allow_val_change=True)
        elif report.kind in FIGURES:
            self._run.log({**report.values, "step": report.step})
        elif report.sample is not None:
            name, sample = report.sample.name, report.sample
            if sample.image is not None:
                self._run.log({name: self._wandb.Image(sample.image), "step": report.step})
            if sample.text:
                page = self._wandb.Html(f"<pre>{html.escape(sample.text)}</pre>")
                self._run.log({name: page, "step": report.step})
        elif report.kind == "end":
            self._ended = True

    def close(self) -> None:
        run, self._run = self._run, None
        if run is not None:  # failed where the training was not reported to have ended
            run.finish(exit_code=0 if self._ended else 1)
