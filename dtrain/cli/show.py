"""Shows what a command has found: in colours at a terminal, as plain text in a pipe."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from rich.console import Console
from rich.table import Table


def show(
    text: str,
    headline: str,
    passed: bool,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    flags: Sequence[bool],
    paragraphs: Sequence[str],
) -> None:
    """Prints a report.

    Args:
        text: all of it, for a pipe, which has no width to fit in.
        headline: the verdict.
        passed: whether it is a good one.
        columns: of the table.
        rows: of the table.
        flags: which rows are good.
        paragraphs: what follows the table.

    Ranks: none.
    """
    # Names of tensors and files are no markup.
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        typer.echo(text)
        return
    console.print(headline, style="bold green" if passed else "bold red")
    table = Table(*columns)
    for row, good in zip(rows, flags, strict=True):
        table.add_row(*row, style=None if good else "red")
    console.print(table)
    for paragraph in paragraphs:
        console.print(paragraph, soft_wrap=True)
        console.print()
