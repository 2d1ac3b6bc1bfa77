"""What a reader of a comparison must know beside its figures."""

import math
from collections.abc import Mapping, Sequence
from statistics import median

from dtrain.studies.pick import Pick
from dtrain.studies.run import Run

ByName = Mapping[str, Sequence[Run]]
Points = Mapping[tuple[str, int], tuple[float, float, float] | None]  # step, seconds, value

#: So many times as far from the base as other seeds are: what has diverged, but not to NaN.
_FAR = 300


def notes_on(
    names: Sequence[str], by_name: ByName, base: str, pick: Pick, points: Points
) -> list[str]:
    """Returns what a reader must know, a sentence each."""
    runs = [run for name in names for run in by_name[name]]
    notes = []
    if waiting := [run for run in runs if run.state == "unfinished"]:
        notes.append(f"{len(waiting)} of {len(runs)} runs have not come to their end yet")
    for name in names:
        mine = by_name[name]
        if none := [run.seed for run in mine if points.get((name, run.seed), ()) is None]:
            notes.append(f"{name}: no value of {pick.words}, in {_seeds(none)}")
        lacking = {run.seed for run in by_name[base]} ^ {run.seed for run in mine}
        if lacking and any(run.state != "unfinished" for run in mine):
            notes.append(
                f"{name} and {base} do not have all seeds in common: compared without "
                f"{_seeds(sorted(lacking))}"
            )
    notes += _on_steps(names, by_name, pick, points)
    notes += _on_outliers(names, by_name, points)
    return notes + _on_starts(names, by_name, base)


def _on_steps(names: Sequence[str], by_name: ByName, pick: Pick, points: Points) -> list[str]:
    """Says where numbers are of other steps; that of the best one is no news."""
    if pick.at in ("best", "evaluate"):
        return []
    found = {}
    for name in names:
        picked = [points.get((name, run.seed)) for run in by_name[name]]
        if steps := [point[0] for point in picked if point is not None]:
            low, high = min(steps), max(steps)
            found[name] = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
    if len({*found.values()}) < 2 and not any(" to " in steps for steps in found.values()):
        return []
    listed = ", ".join(f"{name} {steps}" for name, steps in found.items())
    more = "" if pick.at != "final" else "; --at steps compares where all have come to"
    return [f"figures are not all of the same step ({listed}){more}"]


def _on_outliers(names: Sequence[str], by_name: ByName, points: Points) -> list[str]:
    """Says which seeds are so far off that mean, spread and test tell of them alone."""
    values = {key: point[2] for key, point in points.items() if point and math.isfinite(point[2])}
    notes = []
    for name in names:
        mine = {run.seed: values.get((name, run.seed)) for run in by_name[name]}
        ones = {seed: value for seed, value in mine.items() if value is not None}
        if len(ones) < 3:
            continue
        middle = median(ones.values())
        usual = median(abs(value - middle) for value in ones.values())
        far = {seed: v for seed, v in ones.items() if abs(v - middle) > _FAR * usual > 0}
        if far:
            listed = ", ".join(f"{value:.3g} in seed {seed}" for seed, value in far.items())
            notes.append(
                f"{name} is far off the other seeds ({listed}; their median is {middle:.3g}): "
                "mean, spread and test tell of little else"
            )
    return notes


def _on_starts(names: Sequence[str], by_name: ByName, base: str) -> list[str]:
    """Says where seeds make no difference to what a training begins with, or variants do."""
    notes = []
    starts = {run.seed: run.start for run in by_name[base] if run.start}
    if len({*starts.values()}) < len(starts):
        notes.append(
            "seeds begin with the same weights: the seed does not reach the model, as where the "
            "script seeds torch itself, so the spread between seeds is too small. Call "
            "dtrain.init(seed=...) before the model is made, and no torch.manual_seed after it"
        )
    for name in names:
        if any(run.start and run.start != starts.get(run.seed, run.start) for run in by_name[name]):
            notes.append(
                f"{name} begins with other weights than {base} does with the same seed: what is "
                "seen may be due to these, too"
            )
    return notes


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
