"""The table of a comparison, and what it says in words."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any, Literal

from dtrain.errors import ConfigError
from dtrain.studies.paired import Difference, Pairs, differences
from dtrain.studies.pick import Pick, curve
from dtrain.studies.run import Run
from dtrain.studies.words import escaped, is_share, number, plain, signed, size

Verdict = Literal[
    "base",
    "better",
    "worse",
    "negligible",
    "no difference seen",
    "identical",
    "one seed",
    "breaks",
    "no runs",
]
#: A difference below this part of the spread between the base's seeds is real, but hardly matters.
_SMALL = 0.1
_METHOD = (
    "Differences to {base} are paired by seed; intervals of 95 % by the paired t, corrected for "
    "the number of variants by Holm's method, as are the verdicts; what could have been seen is "
    "seen in 80 % of such studies."
)


@dataclass(frozen=True, slots=True)
class Curves:
    """A variant's runs over their steps, for pictures."""

    variant: str
    lines: tuple[tuple[tuple[float, float], ...], ...]  # (step, value), of each seed


@dataclass(frozen=True, slots=True)
class Table:
    """A comparison of variants with a base; ``str()`` of it is all of it, as text.

    Attributes:
        title: what was trained.
        pick: what is compared.
        base: the variant that the others are compared with.
        rows: a dict for each variant: ``variant``, ``runs``, ``finished``, ``diverged``,
            ``failed``, ``mean`` and ``spread`` (standard deviation) over seeds, ``pairs``,
            ``difference``, ``low``, ``high``, ``p``, ``p_holm``, ``verdict``, ``sentence``,
            ``step_ms``, ``step_ratio`` (to the base), ``memory_mb``, ``error``. None is what cannot
            be known.
        notes: what else a reader must know.
    """

    title: str
    pick: Pick
    base: str
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    curves: tuple[Curves, ...] = ()

    @property
    def heading(self) -> str:
        """What is compared, in a line."""
        better = "more" if self.pick.mode == "max" else "less"
        return f"{self.title}: {self.pick.words} ({better} is better)"

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of what :meth:`cells` returns."""
        return ("variant", "mean", "difference", "p", "seeds", "ms a step", "memory")

    def cells(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns a row for people."""
        scale = row["spread"] or abs(row["mean"] or 0.0) / 100
        mean = "-" if row["mean"] is None else number(row["mean"], scale)
        if row["spread"] is not None:
            mean += f" ± {number(row['spread'], scale)}"
        change = "" if row["verdict"] == "base" else "-"
        if (middle := row["difference"]) is not None:
            low, high = row["low"], row["high"]
            half = abs(middle) if low is None else (high - low) / 2
            change = signed(middle, half)
            if low is not None:
                change += f" ({signed(low, half)} to {signed(high, half)})"
        p = "" if row["p_holm"] is None else f"{row['p_holm']:.3f}".replace("0.000", "<0.001")
        seeds = f"{row['finished']} of {row['runs']}"
        lost = [f"{row[name]} {name}" for name in ("diverged", "failed") if row[name]]
        seeds += f" ({', '.join(lost)})" if lost else ""
        step = "-" if row["step_ms"] is None else f"{row['step_ms']:.3g}"
        if row["step_ratio"] is not None:
            step += f" (x {row['step_ratio']:.2f})"
        memory = "-" if row["memory_mb"] is None else f"{row['memory_mb']:.0f} MB"
        return row["variant"], mean, change, p, seeds, step, memory

    @property
    def sentences(self) -> list[str]:
        """What each variant comes to, in words."""
        return [row["sentence"] for row in self.rows if row["sentence"]]

    @property
    def method(self) -> str:
        """How it was computed."""
        return _METHOD.format(base=self.base)

    def __str__(self) -> str:
        lines = [self.columns, *map(self.cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        parts = [self.heading, "\n".join(table), "\n".join(self.sentences)]
        parts += ["\n".join(f"Note: {note}" for note in self.notes)] if self.notes else []
        return "\n\n".join([*parts, self.method])

    def markdown(self) -> str:
        """Returns it as Markdown, for a pull request or an appendix."""
        lines = [f"**{escaped(self.heading)}**", ""]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + " --- |" * len(self.columns)]
        for row in self.rows:
            lines.append("| " + " | ".join(map(escaped, self.cells(row))) + " |")
        lines += ["", *(f"- {escaped(one)}" for one in self.sentences), ""]
        lines += [f"- Note: {escaped(one)}" for one in self.notes]
        return "\n".join([*lines, *([""] if self.notes else []), self.method, ""])

    def csv(self) -> str:
        """Returns its rows as CSV."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]) if self.rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def json(self) -> str:
        """Returns it as JSON, in which what cannot be known is null."""
        pick = {"metric": self.pick.metric, "mode": self.pick.mode, "at": self.pick.at}
        facts = {"title": self.title, **pick, "base": self.base, "rows": self.rows}
        return json.dumps(facts | {"notes": self.notes, "method": self.method}, indent=1) + "\n"


def make_table(
    runs: Sequence[Run],
    pick: Pick,
    *,
    base: str = "base",
    order: Sequence[str] | None = None,
    title: str = "",
) -> Table:
    """Compares the variants of these runs with the base; ConfigError where there is none of it.

    Runs that failed or diverged count as such, and leave their pair; unfinished ones are told.
    """
    names = list(dict.fromkeys([base, *(order or ()), *(run.variant for run in runs)]))
    ended = [run for run in runs if run.state == "finished"]
    values = dict(zip([(run.variant, run.seed) for run in ended], pick.values(ended), strict=True))
    if not any(variant == base for variant, _ in values):
        failed = [run for run in runs if run.variant == base and run.state == "failed"]
        why = f": it failed ({failed[0].error})" if failed else ""
        raise ConfigError(
            f"no run of {base!r}, with which all is compared, has come to its end{why}"
        )
    by_name = {name: [run for run in runs if run.variant == name] for name in names}
    good = {key: value for key, value in values.items() if value is not None and _is_finite(value)}
    pairs: dict[str, Pairs] = {
        name: [
            (good[base, run.seed], good[name, run.seed])
            for run in by_name[name]
            if (base, run.seed) in good and (name, run.seed) in good
        ]
        for name in names
        if name != base
    }
    compared = differences(pairs)
    share = is_share(pick.metric, good.values())
    rows: list[dict[str, Any]] = []
    for name in names:
        row = _facts(name, by_name, values, good)
        if name != base:
            spread = rows[0]["spread"]
            _judge(row, pairs[name], compared.get(name), pick, share, spread, by_name[base], values)
        rows.append(row)
    curves = tuple(
        Curves(
            name,
            tuple(
                tuple((step, value) for step, _, value in curve(run, pick.metric))
                for run in by_name[name]
            ),
        )
        for name in names
    )
    return Table(title, pick, base, rows, _notes(runs, names, by_name, base, values), curves)


def _facts(
    name: str,
    by_name: Mapping[str, Sequence[Run]],
    values: Mapping[tuple[str, int], float | None],
    good: Mapping[tuple[str, int], float],
) -> dict[str, Any]:
    mine = by_name[name]
    numbers = [good[name, run.seed] for run in mine if (name, run.seed) in good]
    bad = [r for r in mine if values.get((name, r.seed)) is not None and (name, r.seed) not in good]
    failed = [run for run in mine if run.state == "failed"]
    steps = [1000 * run.step_s for run in mine if run.step_s is not None]
    memory = [run.memory / 1e6 for run in mine if run.memory is not None]
    base = {run.seed: run.step_s for run in next(iter(by_name.values()))}
    ratios = [r.step_s / one for r in mine if r.step_s and (one := base.get(r.seed))]
    is_base = name == next(iter(by_name))
    return {
        "variant": name,
        "runs": sum(run.state != "unfinished" for run in mine),
        "finished": len(numbers),
        "diverged": len(bad),
        "failed": len(failed),
        "mean": fmean(numbers) if numbers else None,
        "spread": stdev(numbers) if len(numbers) > 1 else None,
        "pairs": None,
        "difference": None,
        "low": None,
        "high": None,
        "p": None,
        "p_holm": None,
        "verdict": "base" if is_base else "",
        "sentence": "",
        "step_ms": median(steps) if steps else None,
        "step_ratio": median(ratios) if ratios and not is_base else None,
        "memory_mb": max(memory) if memory else None,
        "error": failed[0].error if failed else "",
    }


def _judge(
    row: dict[str, Any],
    pairs: Pairs,
    difference: Difference | None,
    pick: Pick,
    share: bool,
    spread: float | None,
    base: Sequence[Run],
    values: Mapping[tuple[str, int], float | None],
) -> None:
    """Adds the difference, the verdict and the sentence to a variant's row."""
    name, runs = row["variant"], row["runs"]
    deltas = [variant - base for base, variant in pairs]
    row["pairs"] = len(pairs)
    lost = row["diverged"] + row["failed"]
    prefix = _lost_in_words(row, base, values) if lost else ""
    if deltas:
        row["difference"] = fmean(deltas)
    if difference is not None:
        row |= {"low": difference.low, "high": difference.high}
        row |= {"p": difference.p, "p_holm": difference.p_holm}
    verdict: Verdict
    if not runs:
        verdict, words = "no runs", "no run has come to its end yet"
    elif not deltas and lost:
        others = len([r for r in base if r.state == "failed" or not _ended_well(r, values)])
        whole = lost == runs and runs >= 3 and not others
        verdict, words = (
            "breaks",
            "it breaks the training" if whole else "nothing is left to compare",
        )
    elif not deltas:
        verdict, words = "no runs", "it has no seed in common with the base"
    elif not any(deltas):
        verdict = "identical"
        words = (
            f"identical in {len(deltas)} of {len(deltas)} seeds, to the last bit: what was changed "
            "has no effect on this figure"
        )
    elif difference is None:
        verdict = "one seed"
        words = (
            f"{size(deltas[0], deltas[0], pick, share)}; one seed shows nothing: ask for 3 or more"
        )
    elif difference.significant:
        verdict = "better" if (difference.mean > 0) == (pick.mode == "max") else "worse"
        agreeing = sum((delta > 0) == (difference.mean > 0) for delta in deltas if delta)
        ends = sorted(abs(one) for one in (difference.low, difference.high))
        scale = (difference.high - difference.low) / 2
        between = " to ".join(plain(one, scale, share) for one in ends)
        words = (
            f"{size(difference.mean, scale, pick, share)} ({between}), in {agreeing} of "
            f"{len(deltas)} seeds: "
        )
        small = spread is not None and abs(difference.mean) < _SMALL * spread
        words += "real, but small beside the spread between seeds" if small else "it matters"
        verdict = "negligible" if small else verdict
    else:
        verdict, seen = "no difference seen", difference.detectable
        more = difference.seeds_for_half
        about = f"about {more}" if more is not None else "more than 1000"
        words = (
            f"no difference seen; {len(deltas)} seeds could have seen one of "
            f"{plain(seen, seen / 10, share)}{' points' if share else ''}; {about} would see "
            f"{plain(seen / 2, seen / 10, share)}"
        )
    row["verdict"] = verdict
    row["sentence"] = f"{name}: {prefix}{words}"


def _lost_in_words(
    row: Mapping[str, Any], base: Sequence[Run], values: Mapping[tuple[str, int], float | None]
) -> str:
    """Says how many runs diverged or failed, and of the base, before what the others come to."""
    parts = [f"{name} in {row[name]} of {row['runs']} seeds" for name in ("diverged", "failed")]
    parts = [part for part, name in zip(parts, ("diverged", "failed"), strict=True) if row[name]]
    of_base = sum(not _ended_well(run, values) for run in base if run.state != "unfinished")
    words = f"{' and '.join(parts)}, the base in {of_base or 'none'}"
    if row["error"]:
        words += f" ({row['error']})"
    return words + ("; where both ended, " if row["pairs"] else "; ")


def _ended_well(run: Run, values: Mapping[tuple[str, int], float | None]) -> bool:
    value = values.get((run.variant, run.seed))
    return run.state == "finished" and value is not None and _is_finite(value)


def _notes(
    runs: Sequence[Run],
    names: Sequence[str],
    by_name: Mapping[str, Sequence[Run]],
    base: str,
    values: Mapping[tuple[str, int], float | None],
) -> list[str]:
    notes = []
    if waiting := [run for run in runs if run.state == "unfinished"]:
        notes.append(f"{len(waiting)} of {len(runs)} runs have not come to their end yet")
    for name in names:
        none = [r.seed for r in by_name[name] if values.get((name, r.seed), 0.0) is None]
        if none:
            notes.append(f"{name}: no value of the metric there, in seeds {_listed(none)}")
        if name != base and by_name[name] and by_name[name][0].state != "unfinished":
            lacking = {r.seed for r in by_name[base]} ^ {r.seed for r in by_name[name]}
            if lacking:
                notes.append(
                    f"{name} and {base} do not have all seeds in common: compared without "
                    f"{_listed(sorted(lacking))}"
                )
    starts = {run.seed: run.start for run in by_name[base] if run.start}
    if len(starts) > 1 and len({*starts.values()}) < len(starts):
        notes.append(
            "seeds begin with the same weights: the seed does not reach the model, as where the "
            "script seeds torch itself, so the spread between seeds is too small. Call "
            "dtrain.init(seed=...) before the model is made, and no torch.manual_seed after it"
        )
    for name in names:
        other = [
            r.seed for r in by_name[name] if r.start and r.start != starts.get(r.seed, r.start)
        ]
        if other:
            notes.append(
                f"{name} begins with other weights than {base} does with the same seed: what is "
                "seen may be due to these, too"
            )
    return notes


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _is_finite(value: float) -> bool:
    return math.isfinite(value)
