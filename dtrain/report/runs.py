"""What runs have left in their folders, as a page tells it."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtrain.errors import ConfigError
from dtrain.report.thinning import MOST, thinned

_FIGURES = ("train", "epoch", "eval")
_ROWS = ("journal.jsonl", "metrics.jsonl", "metrics.csv")
_OF_A_ROW = ("step", "epoch", "kind", "seconds", "samples", "time")
_MOST_EVENTS, _MOST_SAMPLES, _MOST_PICTURES = 500, 200, 1_500_000  # the last: characters in all


@dataclass
class RunStory:
    """One run, in JSON values.

    Attributes:
        name: its folder's, as long as it takes to tell it from the others.
        status: what ``status.json`` holds.
        config: the user's settings.
        facts: environment and callbacks by hook, where the run kept a journal.
        curves: a thinned curve for each metric, by its full name.
        axes: at some steps, which epoch, second and sample they were.
        events: starts, what was told, ends, and checkpoints that are there.
        samples: texts and pictures.
        notes: what is not on the page, and why.
    """

    name: str
    status: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    curves: dict[str, dict[str, Any]] = field(default_factory=dict)
    axes: dict[str, list[float]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_runs(folders: Sequence[Path]) -> list[RunStory]:
    """Reads what there is of each run, also while it is under way.

    Raises ConfigError where a folder has nothing to tell.
    """
    folders = [*dict.fromkeys(folder.resolve() for folder in folders)]
    return [_read(f, n) for f, n in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of paths that tell them apart."""
    length = 1
    while length < 20:
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len({*names}) == len(names):
            return names
        length += 1
    return [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> RunStory:
    lines, source = _lines(folder)
    story = RunStory(name, _json(folder / "status.json"), _json(folder / "config.json"))
    rows: list[dict[str, Any]] = []
    for line in lines:
        if line.get("kind") in _FIGURES:
            rows.append(line)
        elif line.get("kind") == "start":
            story.facts = line.get("facts") or story.facts
            story.config = story.config or line.get("config") or {}
            story.events.append(_event(line, "start"))
        elif line.get("kind") in ("message", "end"):
            story.events.append(_event(line, str(line["kind"])))
        elif isinstance(line.get("sample"), dict):
            story.samples.append({"step": line.get("step", 0), **line["sample"]})
    if source != "journal.jsonl":
        story.notes.append(
            "events, samples, callbacks and environment are not known: this run kept no journal "
            "(sinks=[Console(), Journal()])"
        )
    _take_curves(story, rows)
    story.axes = _axes(rows)
    story.events += _checkpoints(folder)
    story.events.sort(key=lambda event: float(event["step"]))
    _bound(story)
    return story


def _lines(folder: Path) -> tuple[list[dict[str, Any]], str]:
    for name in _ROWS:
        file = folder / name
        if not file.is_file():
            continue
        if file.suffix == ".csv":
            with file.open(encoding="utf-8", newline="") as rows:
                return [{**row} for row in csv.DictReader(rows)], name
        return [*_objects(file)], name
    there = "is no folder" if not folder.is_dir() else f"has none of {', '.join(_ROWS)}"
    raise ConfigError(
        f"{folder} {there}: a page is made of what a run's sinks wrote there. Train with "
        "sinks=[Console(), Journal()], from dtrain.sinks, and with a run_dir"
    )


def _objects(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        for line in lines:
            try:
                found = json.loads(line)
            except ValueError:
                continue  # the last line of a run that is under way
            if isinstance(found, dict):
                yield found


def _event(line: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "step": line.get("step", 0),
        "text": str(line.get("text", "")),
        "time": line.get("time"),
    }


def _take_curves(story: RunStory, rows: Iterable[Mapping[str, Any]]) -> None:
    points: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        held = row.get("values")
        figures = held if isinstance(held, dict) else row
        for name, value in figures.items():
            number = None if name in _OF_A_ROW else _number(value)
            if number is not None:
                steps, values = points.setdefault(str(name), ([], []))
                steps.append(float(row["step"]))
                values.append(number)
    story.curves = {name: thinned(steps, values) for name, (steps, values) in points.items()}


def _number(value: Any) -> float | None:
    try:  # also "nan" and "inf", for which JSON has no word
        return float(value)
    except (TypeError, ValueError):
        return None  # an empty place of a CSV row


def _axes(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Returns ``step``, ``epoch``, ``seconds`` and ``samples`` at some rows, all growing.

    Seconds count on over restarts; an epoch's end is told by its own row.
    """
    axes: dict[str, list[float]] = {name: [] for name in ("step", "epoch", "seconds", "samples")}
    before, last, epoch, ended = 0.0, 0.0, 0.0, 0.0
    for row in rows:
        seconds, step = float(row.get("seconds") or 0), float(row["step"])
        if seconds < last:  # another start, or another fit
            before += last
        last = seconds
        if row.get("kind") == "epoch":
            ended = float(row.get("epoch") or 0) + 1
        epoch = max(epoch, ended if row.get("kind") == "epoch" else float(row.get("epoch") or 0))
        if axes["step"] and step <= axes["step"][-1]:
            axes["epoch"][-1] = epoch
            continue
        for name, value in zip(
            axes, (step, epoch, before + seconds, float(row.get("samples") or 0)), strict=True
        ):
            axes[name].append(value)
    every = -(-len(axes["step"]) // MOST) or 1
    return {name: [*values[::every], *values[-1:]] for name, values in axes.items()}


def _checkpoints(folder: Path) -> list[dict[str, Any]]:
    found = []
    for place, words in (("checkpoints", "saved"), ("emergency", "saved as a step failed")):
        for one in sorted((folder / place).glob("step-*")):
            number = one.name.removeprefix("step-")
            if number.isdecimal():
                step, text = int(number), f"{words}: {place}/{one.name}"
                found.append({"kind": "save", "step": step, "text": text, "time": None})
    return found


def _bound(story: RunStory) -> None:
    """Leaves out what would make the page too large, and notes it."""
    if (more := len(story.events) - _MOST_EVENTS) > 0:
        first = _MOST_EVENTS // 2
        story.events = story.events[:first] + story.events[-first:]
        story.notes.append(f"{more} events between the first and last {first} are left out")
    if (more := len(story.samples) - _MOST_SAMPLES) > 0:
        story.samples = story.samples[-_MOST_SAMPLES:]
        story.notes.append(f"the first {more} samples are left out")
    size = 0
    for sample in reversed(story.samples):
        size += len(sample.get("png", ""))
        if size > _MOST_PICTURES and sample.pop("png", None):
            sample["missing"] = "a picture, left out: there are too many for one page"


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}  # not there, or just being written
    return found if isinstance(found, dict) else {}
