"""How comparisons are shown, and ``dtrain compare``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable

from dtrain.cli.trials import refusing
from dtrain.errors import ConfigError
from dtrain.studies import Table, compare_runs, draw, draw_in_terminal
from dtrain.trials import table_of_study

_STYLES = {"better": "green", "worse": "red", "breaks": "bold red"}

#: What all that shows a comparison takes.
Mode = Annotated[
    str | None, typer.Option(help="max if more is better, min if less; known for usual names.")
]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


def show_table(table: Table, *, markdown: bool = False, json: bool = False) -> None:
    """Prints a comparison: in colours and with its picture at a terminal, else as text."""
    if markdown or json:
        typer.echo(table.json() if json else table.markdown(), nl=False)
        return
    # Names of metrics and variants are no markup.
    console = Console(markup=False, highlight=False, emoji=False)
    plain = not (console.encoding or "").lower().startswith("utf")
    picture = draw_in_terminal(table, console.width, ascii_only=plain)
    if not console.is_terminal:
        text = f"{table}\n\n{picture}"
        plain_text = text.replace("±", "+-").encode("ascii", "replace").decode()
        typer.echo(plain_text if plain else text)
        return
    console.print(table.heading, style="bold")
    shown = RichTable(*table.columns)
    for row in table.rows:
        shown.add_row(*table.cells(row), style=_STYLES.get(row["verdict"]))
    console.print(shown)
    for row in table.rows:
        if row["sentence"]:
            console.print(row["sentence"], style=_STYLES.get(row["verdict"]), soft_wrap=True)
    console.print(f"\n{picture}\n")
    for note in table.notes:
        console.print(f"Note: {note}", style="yellow", soft_wrap=True)
    console.print(table.method, style="dim", soft_wrap=True)


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Folders of runs, NAME=PATTERN for several, or a study's folder."),
    ],
    base: Annotated[
        str | None, typer.Option(help="The group to compare with; the first by default.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="What to compare; eval/loss by default, or train/loss.")
    ] = None,
    mode: Mode = None,
    at: Annotated[
        str | None, typer.Option(help="final, best, steps, time, steps=500, time=60, evaluate.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write the picture to this file (.png, .pdf, .svg).")
    ] = None,
    markdown: AsMarkdown = False,
    json: AsJSON = False,
) -> None:
    """Compare runs that exist, paired by seed; or show the table of a study.

    Runs that are made alike but for the seed are one group. NAME=PATTERN makes a group:
    dtrain compare base=runs/base-* ema=runs/ema-*

    Exit status: 0 if there is a table, 2 if not.
    """
    with refusing("compare", ConfigError):
        if len(runs) == 1 and (Path(runs[0]) / "study.json").exists():
            if base is not None:
                raise ConfigError("--base: a study has its own")
            table = table_of_study(Path(runs[0]), metric, mode, at).report
        else:
            how: Any = {"mode": mode}  # which is checked there
            table = compare_runs(runs, base=base, metric=metric, at=at or "final", **how)
        if picture is not None:
            try:
                draw(table).savefig(picture)
            except (OSError, ValueError) as error:
                raise ConfigError(f"--picture {picture}: {error}") from error
    show_table(table, markdown=markdown, json=json)
