"""Runs that exist already, grouped and compared: ``dtrain compare``."""

import glob
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dtrain.errors import ConfigError
from dtrain.studies.pick import Mode, Pick, check_metric, guess_mode
from dtrain.studies.run import Run, read_rows
from dtrain.studies.table import Table, make_table

#: What of a run's make-up is its seed, or where its files are.
_NOT_A_GROUP = ("seed", "run_dir", "run-dir", "output_dir", "ablation.seed")
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
    grouped = _grouped([(folder, _made(folder)) for folder in unnamed])
    if both := {run.variant for run in found} & {run.variant for run in grouped}:
        raise ConfigError(
            f"{', '.join(sorted(both))} names a group, and would be the name of runs without one: "
            "name all groups, such as base=runs/base-* ema=runs/ema-*"
        )
    found += grouped
    if len(found) < 2:
        raise ConfigError("name two runs or more, or groups of them: base=runs/base-*")
    _check_seeds(found)
    names = list(dict.fromkeys(run.variant for run in found))
    first = base or names[0]
    if first not in names:
        raise ConfigError(f"--base {first}: the groups are {', '.join(names)}")
    if len(names) == 1:
        raise ConfigError(
            f"all {len(found)} runs are one group, {names[0]!r}"
            + (", made alike but for the seed as far as can be seen" if grouped else "")
            + ": name groups to compare, such as base=runs/base-* ema=runs/ema-*"
        )
    if metric is None:
        have = [{name for row in run.rows for name in row} for run in found if run.rows]
        metric = "eval/loss" if have and all("eval/loss" in one for one in have) else "train/loss"
    pick = Pick(metric, mode or guess_mode(metric), at)
    for run in found:
        if run.variant == first and run.state == "finished":
            check_metric(run, pick)
    order = [first, *(name for name in names if name != first)]
    table = make_table(found, pick, base=first, order=order, title=f"{len(found)} runs")
    return replace(table, notes=[*table.notes, *_notes(grouped)])


def _notes(grouped: Sequence[Run]) -> list[str]:
    """Says which runs were taken for one group, and what of them cannot be seen."""
    groups: dict[str, list[str]] = {}
    for run in grouped:
        groups.setdefault(run.variant, []).append(str(run.path))
    if not groups:
        return []
    if len(groups) == len(grouped):
        return [
            "each run is made otherwise, so each is a group of its own: if some are alike but for "
            "the seed, name groups, such as base=runs/base-* ema=runs/ema-*"
        ]
    notes = [f"{name} is {', '.join(ones)}" for name, ones in groups.items()]
    return [
        *notes,
        "runs were grouped by what they note: model, optimizer's class, names of callbacks, data, "
        "Trainer(config=...). Arguments of callbacks and of the optimizer are not seen unless they "
        "are in the config: if they differ within a group, name groups",
    ]


def _folders(runs: Sequence[str | Path]) -> tuple[list[tuple[str, Path]], list[Path]]:
    named: list[tuple[str, Path]] = []
    unnamed: list[Path] = []
    for given in runs:
        name, equals, pattern = str(given).partition("=")
        if not equals and not Path(given).exists() and (found := sorted(glob.glob(str(given)))):
            unnamed += [Path(one) for one in found if Path(one).is_dir()]  # a quoted pattern
            continue
        if not equals or Path(given).is_dir():
            unnamed.append(Path(given))
            continue
        folders = [Path(one) for one in sorted(glob.glob(pattern)) if Path(one).is_dir()]
        if not folders:
            raise ConfigError(f"{given}: no folder is named like {pattern}")
        named += [(name, folder) for folder in folders]
    return named, unnamed


def _made(folder: Path) -> dict[str, Any]:
    """Returns what a run is made of, less its seed; of settings in settings, ``outer.inner``."""
    made = {**_fingerprint(folder), **_flat(_json(folder / "config.json"))}
    return {key: value for key, value in made.items() if key not in _NOT_A_GROUP}


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _grouped(runs: Sequence[tuple[Path, dict[str, Any]]]) -> list[Run]:
    """Returns runs as groups that are made alike, named by how they differ from the first."""
    groups: list[tuple[dict[str, Any], str]] = []
    found = []
    for folder, made in runs:
        name = next((name for others, name in groups if others == made), None)
        if name is None:
            name = str(made.get("ablation.variant", "base"))
            name = _difference(groups[0][0], made) if groups else name
            taken = {other for _, other in groups}
            if not name or name in taken:
                name = folder.name if folder.name not in {*taken, ""} else str(folder)
            groups.append((made, name))
        found.append(_read(folder, name))
    return found


def _difference(base: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    """Says in a few words how a run is made otherwise."""
    if "ablation.variant" in made:
        return str(made["ablation.variant"])
    parts = []
    for key in dict.fromkeys([*base, *made]):
        old, new = base.get(key), made.get(key)
        if old == new and (key in base) == (key in made):
            continue
        if key == "callbacks" and isinstance(old, list) and isinstance(new, list):
            less, more = Counter(old) - Counter(new), Counter(new) - Counter(old)
            parts += [f"without {one}" for one in less.elements()]
            parts += [f"with {one}" for one in more.elements()]
            parts += [] if less or more else ["callbacks in another order"]
        elif key not in made:
            parts.append(f"no {key}")
        elif key == "model" or isinstance(new, list):
            parts.append(f"another {key}")
        else:
            parts.append(f"{key}={new}")
    return ", ".join(parts)


def _read(folder: Path, name: str) -> Run:
    seed = _fingerprint(folder).get("seed")
    if not isinstance(seed, int):
        raise ConfigError(f"{folder}/status.json tells no seed: it is of a run that never began")
    status, note = _json(folder / "status.json"), _json(folder / "run.json")
    state = _STATES.get(str(status.get("status")), "unfinished")
    error = str(status.get("reason") or "").partition("\n")[0] if state == "failed" else ""
    about = {key: note[key] for key in ("step_s", "memory", "start", "evaluated") if key in note}
    return Run(name, seed, state, read_rows(folder), error=error, path=folder, **about)


def _fingerprint(folder: Path) -> dict[str, Any]:
    """Returns what a run's status.json says of its make-up; ConfigError where there is no run."""
    status = _json(folder / "status.json")
    if not status:
        study = (folder / "study.json").exists()
        raise ConfigError(
            f"{folder} is a study: compare it by itself, or its runs, such as base={folder}/base/*"
            if study
            else f"{folder} holds no run: there is no status.json, which a Trainer with a run_dir "
            "writes"
        )
    return dict(status.get("fingerprint") or status.get("make_up") or {})  # the latter until 0.1


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
    """Returns what a file says, nothing where there is none; ConfigError where it is damaged."""
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}
