"""Runs a trial of a script, and shows its report: in colours at a terminal, else as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import typer
from rich.console import Console
from rich.table import Table

from dtrain.errors import CheckError, ConfigError
from dtrain.trials import TrialReport

NOT_PASSED, NOT_TRIED, INTERRUPTED = 1, 2, 130


class Found(Protocol):
    """What a trial returns."""

    @property
    def report(self) -> TrialReport:
        """In words."""
        ...


def show(command: str, trial: Callable[[Callable[[str], None]], Found]) -> None:
    """Runs a trial and prints what it found; the exit status says whether that is good.

    Args:
        command: on whose behalf.
        trial: takes what is to be told what runs next.

    Raises:
        typer.Exit: it did not pass, could not be tried, or was interrupted.

    Ranks: none.
    """
    try:
        report = trial(lambda words: typer.echo(f"  {words} ...", err=True)).report
    except (CheckError, ConfigError) as error:
        typer.echo(f"dtrain {command}: {error}", err=True)
        raise typer.Exit(NOT_TRIED) from error
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None  # not 1, which would be a finding
    # Names of tensors and files are no markup.
    console = Console(markup=False, highlight=False, emoji=False)
    if console.is_terminal:
        _show_in_colours(console, report)
    else:
        typer.echo(str(report))
    if not report.passed:
        raise typer.Exit(NOT_PASSED)


def _show_in_colours(console: Console, report: TrialReport) -> None:
    console.print(report.headline, style="bold green" if report.passed else "bold red")
    table = Table(*report.columns)
    for row, good in report.rows:
        table.add_row(*row, style=None if good else "red")
    console.print(table)
    for paragraph in report.paragraphs:
        console.print(paragraph, soft_wrap=True)
        console.print()
