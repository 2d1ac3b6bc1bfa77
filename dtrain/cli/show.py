"""Runs a trial of a script, and shows its report: in colours at a terminal, else as text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dtrain.errors import CheckError, ConfigError, DtrainError
from dtrain.trials import Drilled, Equivalence, TrialReport

NOT_PASSED, NOT_DONE, INTERRUPTED = 1, 2, 130


#: What a trial of a script takes.
Script = Annotated[Path, typer.Argument(help="A script that calls Trainer(...).fit(...).")]
ScriptArgs = Annotated[
    list[str] | None, typer.Argument(help="The script's own arguments, as they are.")
]
Progress = Callable[[str], None]


@contextmanager
def refusing(command: str, *errors: type[DtrainError]) -> Iterator[None]:
    """Says what a command could not do, and ends it with status 2."""
    try:
        yield
    except errors as error:
        typer.echo(f"dtrain {command}: {error}", err=True)
        raise typer.Exit(NOT_DONE) from error


def show(command: str, trial: Callable[[Progress], Equivalence | Drilled]) -> None:
    """Runs a command's trial and prints what it found; the exit status says whether that is good.

    Ranks: none.
    """
    try:
        with refusing(command, CheckError, ConfigError):
            report = trial(lambda words: typer.echo(f"  {words} ...", err=True)).report
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
