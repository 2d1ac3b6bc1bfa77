"""Runs that exist already, grouped and compared: ``dtrain compare``."""

import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dtrain.errors import ConfigError
from dtrain.studies.pick import Mode, Pick, check_metric, guess_mode
from dtrain.studies.run import Run, read_rows
from dtrain.studies.table import Table, make_table

#: What of a run's make-up is its seed, or follows from where it ran.
_NOT_A_GROUP = ("seed", "ablation", "run_dir", "run-dir", "output_dir", "name")
_STATES: dict[str, Literal["finished", "failed", "unfinished"]] = {
    "finished": "finished",
    "failed": "failed",
}


def compare_runs(
    runs: Sequence[str | Path],
    *,
    base: str | None = None,
    metric: str | None = None,
    mode: Mode | None = None,
    at: str = "final",
) -> Table:
    """Compares runs that exist, paired where seeds match.

    Example::

        print(dtrain.compare_runs(["base=runs/base-*", "ema=runs/ema-*"]))

    Args:
        runs: folders of runs, or ``NAME=PATTERN`` for several as one group. Without names, runs
            that are made alike but for the seed are one group.
        base: the group that the others are compared with; the first one by default.
        metric: what to compare; ``eval/loss`` if all have it, else ``train/loss``.
        mode: ``"max"`` if more is better, ``"min"`` if less is; known for usual names.
        at: where, as for :func:`dtrain.ablate`.

    Raises:
        ConfigError: a folder holds no run, a group has two runs of one seed, or an argument is off.

    Ranks: none.
    """
    named, unnamed = _folders(runs)
    found = [_read(folder, name) for name, folder in named]
    found += _grouped([_facts(folder) for folder in unnamed])
    if not found:
        raise ConfigError("name two runs or more, or groups of them: base=runs/base-*")
    _check_seeds(found)
    names = list(dict.fromkeys(run.variant for run in found))
    first = base or names[0]
    if first not in names:
        raise ConfigError(f"--base {first}: the groups are {', '.join(names)}")
    if len(names) == 1:
        raise ConfigError(
            f"all {len(found)} runs are made alike but for the seed, so they are one group: name "
            "groups to compare, such as base=runs/base-* ema=runs/ema-*"
        )
    if metric is None:
        have = [{name for row in run.rows for name in row} for run in found if run.rows]
        metric = "eval/loss" if have and all("eval/loss" in one for one in have) else "train/loss"
    pick = Pick(metric, mode or guess_mode(metric), at)
    for run in found:
        if run.variant == first and run.state == "finished":
            check_metric(run, pick)
    order = [first, *(name for name in names if name != first)]
    return make_table(found, pick, base=first, order=order, title=f"{len(found)} runs")


def _folders(runs: Sequence[str | Path]) -> tuple[list[tuple[str, Path]], list[Path]]:
    named: list[tuple[str, Path]] = []
    unnamed: list[Path] = []
    for given in runs:
        name, equals, pattern = str(given).partition("=")
        if not equals or Path(given).is_dir():
            unnamed.append(Path(given))
            continue
        folders = [Path(one) for one in sorted(glob.glob(pattern)) if Path(one).is_dir()]
        if not folders:
            raise ConfigError(f"{given}: no folder is named like {pattern}")
        named += [(name, folder) for folder in folders]
    return named, unnamed


def _facts(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Returns a run's folder and what it is made of, less its seed."""
    status, config = _json(folder / "status.json"), _json(folder / "config.json")
    made = {**status.get("fingerprint", {}), **config}
    return folder, {key: value for key, value in made.items() if key not in _NOT_A_GROUP}


def _grouped(runs: Sequence[tuple[Path, dict[str, Any]]]) -> list[Run]:
    """Returns runs as groups that are made alike, named by how they differ from the first."""
    groups: list[tuple[dict[str, Any], str]] = []
    found = []
    for folder, made in runs:
        name = next((name for others, name in groups if others == made), None)
        if name is None:
            name = _difference(groups[0][0], made) if groups else "base"
            if not name or any(name == other for _, other in groups):
                name = folder.name
            groups.append((made, name))
        found.append(_read(folder, name))
    return found


def _difference(base: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    """Says in a few words how a run is made otherwise."""
    parts = []
    for key in dict.fromkeys([*base, *made]):
        old, new = base.get(key), made.get(key)
        if old == new:
            continue
        if key == "callbacks" and isinstance(old, list) and isinstance(new, list):
            parts += [f"without {one}" for one in old if one not in new]
            parts += [f"with {one}" for one in new if one not in old]
        elif key != "model" and not isinstance(new, list | dict):
            parts.append(f"{key}={new}")
        else:
            parts.append(f"another {key}")
    return ", ".join(parts)


def _read(folder: Path, name: str) -> Run:
    status = _json(folder / "status.json")
    rows = read_rows(folder) if folder.is_dir() else []
    if not status and not rows:
        raise ConfigError(
            f"{folder} holds no run: there is no status.json, metrics.jsonl or metrics.csv (those "
            "are of the sinks JSONLines and CSV)"
        )
    note = _json(folder / "run.json")
    seed = note.get("seed", status.get("fingerprint", {}).get("seed", 0))
    state = _STATES.get(str(status.get("status", "finished")), "unfinished")
    error = str(status.get("reason") or "").partition("\n")[0] if state == "failed" else ""
    return Run(name, int(seed), state, rows, error=error, path=folder)


def _check_seeds(runs: Sequence[Run]) -> None:
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        if other := seen.get((run.variant, run.seed)):
            raise ConfigError(
                f"{other.path} and {run.path} both have the seed {run.seed}, and are made alike as "
                f"far as can be seen ({run.variant!r}): name groups, such as a={other.path} "
                f"b={run.path}"
            )
        seen[run.variant, run.seed] = run


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
