"""The table of a comparison, and what it says in words."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any

from dtrain.errors import ConfigError
from dtrain.studies.notes import notes_on
from dtrain.studies.paired import Pairs, differences
from dtrain.studies.pick import Pick, curve
from dtrain.studies.run import Run, ends_badly, losses_of
from dtrain.studies.verdict import Facts, judge
from dtrain.studies.words import escaped, is_share, number, signed

_METHOD = (
    "Differences to {base} are paired by seed; intervals of 95 % by the paired t, corrected for "
    "the number of variants by Holm's method, as are the verdicts; what could have been seen is "
    "seen in 80 % of such studies."
)


#: So much may the ratios of a step's time differ between seeds, for one to be told.
_AGREEING = 1.5


@dataclass(frozen=True, slots=True)
class Curves:
    """A variant's runs over their steps, for pictures."""

    variant: str
    lines: tuple[tuple[tuple[float, float], ...], ...]  # (step, value), of each seed
    differences: tuple[float, ...] = ()  # to the base, of each pair


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
        return ("variant", "mean", "difference", "p (Holm)", "seeds", "ms a step", "memory")

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
        more = {"notes": self.notes, "method": self.method}
        return json.dumps(facts | more, indent=1, allow_nan=False) + "\n"


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
    points = dict(zip([(run.variant, run.seed) for run in ended], pick.points(ended), strict=True))
    values = {key: None if point is None else point[2] for key, point in points.items()}
    values |= {(run.variant, run.seed): math.nan for run in ended if ends_badly(run)}
    if not any(variant == base for variant, _ in values):
        failed = [run for run in runs if run.variant == base and run.state == "failed"]
        why = f": it failed ({failed[0].error})" if failed else ""
        raise ConfigError(
            f"no run of {base!r}, with which all is compared, has come to its end{why}"
        )
    by_name = {name: [run for run in runs if run.variant == name] for name in names}
    good = {
        key: value for key, value in values.items() if value is not None and math.isfinite(value)
    }
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
            alike = _alike(by_name[base], by_name[name])
            facts = Facts(pick, share, spread, by_name[base], values, alike)
            row |= judge(row, pairs[name], compared.get(name), facts)
        rows.append(row)
    curves = tuple(
        Curves(
            name,
            tuple(
                tuple((step, value) for step, _, value in curve(run, pick.metric))
                for run in by_name[name]
            ),
            tuple(variant - base for base, variant in pairs.get(name, ())),
        )
        for name in names
    )
    notes = notes_on(names, by_name, base, pick, points)
    return Table(title, pick, base, rows, notes, curves)


def _alike(base: Sequence[Run], variant: Sequence[Run]) -> bool:
    """Says whether runs of the same seed have the same losses."""
    others = {run.seed: run for run in base}
    return all(
        losses_of(run) == losses_of(others[run.seed]) for run in variant if run.seed in others
    )


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
    agree = ratios and max(ratios) <= _AGREEING * min(ratios)
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
        # Seeds that do not agree on it tell of the machine, not of the variant.
        "step_ratio": median(ratios) if agree and not is_base else None,
        "memory_mb": max(memory) if memory else None,
        "error": failed[0].error if failed else "",
    }
