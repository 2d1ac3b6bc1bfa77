"""What of each run is compared: one number, by metric and place."""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dtrain.errors import ConfigError
from dtrain.studies.run import Run

Mode = Literal["min", "max"]
# Words between spaces.
_MORE = (
    " accuracy acc auc auroc f1 precision recall iou miou dice bleu rouge map ap top1 top5 r2 psnr "
    "ssim reward score "
)
_LESS = " loss error err perplexity ppl mse mae rmse nll bpb wer cer fid bce ce kl regret "
#: What makes another thing of them: "neg_mse", "accuracy_gap", "loss_scale".
_TURNS = (
    " neg negative minus inverse gap drop diff difference delta change std var variance scale "
    "weight ratio forgetting "
)
_FIXED = ("step", "epoch", "kind", "seconds", "samples")
_HOW = "final, best, steps, time, steps=500, time=60 (seconds) or evaluate"


@dataclass(frozen=True, slots=True)
class Pick:
    """A metric, which way is better, and where in a run it is looked at.

    ``at`` is ``"final"`` (the last value), ``"best"``, ``"steps"`` or ``"time"`` (the last step, or
    second, that all finished runs have come to), ``"steps=500"``, ``"time=60"``, or ``"evaluate"``
    (what the script's last ``Trainer.evaluate`` returned).
    """

    metric: str
    mode: Mode
    at: str = "final"

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ConfigError(f"mode {self.mode!r}: min (less is better) or max (more is better)")
        if not re.fullmatch(r"final|best|evaluate|(steps|time)(=\d+(\.\d+)?)?", self.at):
            raise ConfigError(f"at {self.at!r}: choose {_HOW}")

    @property
    def words(self) -> str:
        """For people: ``eval/accuracy, final``."""
        where = {"final": "final", "best": "best", "evaluate": "by the script's last evaluate"}
        where |= {"steps": "at the last step that all came to"}
        where |= {"time": "at the last second that all came to"}
        kind, _, limit = self.at.partition("=")
        at = f"at {limit} {'steps' if kind == 'steps' else 'seconds'}" if limit else where[kind]
        return f"{self.metric}, {at}"

    def points(self, runs: Sequence[Run]) -> list[tuple[float, float, float] | None]:
        """Returns each run's step, seconds and number (the former are NaN for ``evaluate``)."""
        kind, _, given = self.at.partition("=")
        limit = math.inf
        if kind in ("steps", "time"):
            ends = [c[-1][kind == "time"] for run in runs if (c := curve(run, self.metric))]
            limit = float(given) if given else min(ends, default=math.inf)
        return [self._point(run, kind, limit) for run in runs]

    def _point(self, run: Run, kind: str, limit: float) -> tuple[float, float, float] | None:
        if kind == "evaluate":
            value = run.evaluated.get(self.metric)
            return None if value is None else (math.nan, math.nan, value)
        points = curve(run, self.metric)
        if kind == "best":
            finite = [point for point in points if math.isfinite(point[2])]
            best = min if self.mode == "min" else max
            if finite:
                return best(finite, key=lambda point: point[2])
        if kind in ("steps", "time"):
            came_to = run.rows[-1].get("seconds" if kind == "time" else "step", 0) if points else 0
            if came_to < limit:  # what it has is of an earlier place than that of the others
                return None
            points = [point for point in points if point[kind == "time"] <= limit]
        return points[-1] if points else None


def curve(run: Run, metric: str) -> list[tuple[float, float, float]]:
    """Returns a metric's values over a run, as (step, seconds, value)."""
    return [(r["step"], r["seconds"], r[metric]) for r in run.rows if metric in r and "step" in r]


def check_metric(run: Run, pick: Pick) -> None:
    """Raises ConfigError where a finished run has no such metric, with those that there are."""
    if pick.at == "evaluate":
        names, where = sorted(run.evaluated), " in what its last Trainer.evaluate returned"
        none = "it never calls Trainer.evaluate after its training"
    else:
        names = sorted({name for row in run.rows for name in row} - {*_FIXED})
        where, none = "", "it has no figures at all (of the sinks JSONLines or CSV)"
    if pick.metric in names:
        return
    close = difflib.get_close_matches(pick.metric, names, 1)
    hint = f" Did you mean {close[0]}?" if close else ""
    there = f"There are {', '.join(names)}." if names else f"In fact {none}."
    raise ConfigError(f"the run has no metric {pick.metric!r}{where}.{hint} {there}")


def guess_mode(metric: str) -> Mode:
    """Returns which way a metric of a usual name is better; ConfigError for any other name."""
    words = [word for word in re.split(r"[^a-z0-9]+", metric.lower()) if word]
    for word in reversed(words):
        if any(f" {other} " in _TURNS for other in words):
            break
        if f" {word} " in _MORE:
            return "max"
        if f" {word} " in _LESS:
            return "min"
    raise ConfigError(f"is more of {metric!r} better, or less? Say --mode max or --mode min")
