"""``dtrain ls``: the runs below a folder."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dtrain.cli.trials import refusing
from dtrain.errors import CheckpointError

_STYLES = {"failed": "red", "damaged": "red", "running": "green", "preempted": "yellow"}


def ls(
    folder: Annotated[Path, typer.Argument(help="A folder that holds runs.")] = Path("runs"),
) -> None:
    """List the runs below a folder: state, step, best figures, newest checkpoint.

    A run that was killed says "running", as of when it last told of itself.

    Exit status: 0, or 2 if there is no such folder.
    """
    from dtrain.checkpoint import list_runs  # here: it imports torch, and others need none

    with refusing("ls", CheckpointError):
        runs = list_runs(folder)
    if not runs:
        typer.echo(f"no run in {folder} or below: none of its folders has a status.json")
        return
    # A pipe has no width, and a row must not be broken for it.
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 250
    table = Table("run", "state", "step", "best", "saved at", "told", box=None, pad_edge=False)
    for run in runs:
        table.add_row(
            str(run.folder),
            run.state,
            str(run.step),
            run.best,
            "" if run.saved is None else str(run.saved),
            _ago(run.age_s),
            style=_STYLES.get(run.state),
        )
    console.print(table)


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
