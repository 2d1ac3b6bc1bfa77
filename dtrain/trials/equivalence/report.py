"""What a check found, as values and in plain words."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from dtrain.trials.equivalence.compare import Comparison

_WIDTH = 92
_SHOWN = 5  # tensors of a run, by name

#: The columns of the table.
COLUMNS = ("run", "loss off by", "worst tensor", "gradient off by", "verdict")


@dataclass(frozen=True, slots=True)
class Cause:
    """Why numbers part.

    Attributes:
        name: short, such as ``"ragged mean"``.
        evidence: what was seen, with values.
        remedy: what to do.
    """

    name: str
    evidence: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Equivalence:
    """What :func:`dtrain.check_equivalence` found; ``str()`` of it is the report.

    Attributes:
        script: which.
        steps: how many global steps were compared.
        dtype: what it was computed in.
        runs: each run against one rank with one micro-batch.
        causes: why numbers part, where they do.
        zero_gradients: parameters that differ only because their gradient is zero but for
            rounding.
        notes: what else is worth knowing.
    """

    script: str
    steps: int
    dtype: str
    runs: tuple[Comparison, ...]
    causes: tuple[Cause, ...] = ()
    zero_gradients: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Every run gives the numbers of one rank with one micro-batch."""
        return all(run.equal for run in self.runs)

    def __str__(self) -> str:
        return "\n\n".join([headline(self), as_text(COLUMNS, rows(self)), *paragraphs(self)])


def headline(found: Equivalence) -> str:
    """Returns the verdict, in a sentence."""
    what = f"{found.script}, {found.steps} step{'s' * (found.steps != 1)} in {found.dtype}"
    if found.passed:
        return f"EQUAL: {what}: the numbers do not depend on ranks or micro-batches."
    count = sum(not run.equal for run in found.runs)
    return f"NOT EQUAL: {what}: {count} of {len(found.runs)} runs part from 1 rank x 1 micro-batch."


def rows(found: Equivalence) -> list[tuple[str, ...]]:
    """Returns the table's rows, as text in the order of :data:`COLUMNS`."""
    return [
        (
            run.title,
            _gap(run.loss_gap),
            run.worst if run.worst_gap else "(none)",
            _gap(run.worst_gap),
            _verdict(run),
        )
        for run in found.runs
    ]


def paragraphs(found: Equivalence) -> list[str]:
    """Returns all that follows the table: tensors, causes, zero gradients, notes."""
    parts = []
    worst = max(found.runs, key=lambda run: len(run.parted), default=None)
    if worst is not None and worst.parted:
        lines = [
            f"  {p.name}: {_gap(p.gap)}"
            + (" (only the parameter)" if p.step is None else f", from step {p.step + 1} on")
            for p in worst.parted[:_SHOWN]
        ]
        more = len(worst.parted) - _SHOWN
        lines += [f"  and {more} more"] * (more > 0)
        what = "Gradients that part" if worst.first_step is not None else "Parameters that part"
        parts.append("\n".join([f"{what} on {worst.title}, relative to their size:", *lines]))
    parts += [
        f"Cause: {cause.name}\n{_block(cause.evidence)}\n{_block('What to do: ' + cause.remedy)}"
        for cause in found.causes
    ]
    if found.zero_gradients:
        parts.append(
            "Zero gradient, so not compared (an optimizer like Adam turns rounding into steps):\n"
            + _block(", ".join(found.zero_gradients))
        )
    parts += [_fill(f"Note: {note}") for note in found.notes]
    return parts


def _verdict(run: Comparison) -> str:
    if run.equal:
        return "equal"
    if run.strays:
        return "ranks drift apart"
    return "parts" if run.first_step is None else f"parts at step {run.first_step + 1}"


def _gap(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def as_text(columns: tuple[str, ...], table: list[tuple[str, ...]]) -> str:
    """Returns a table as lines of text, its columns under one another."""
    whole = [columns, *table]
    widths = [max(len(row[i]) for row in whole) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in whole
    )


def _block(text: str) -> str:
    return _fill(text, indent="  ")


def _fill(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
