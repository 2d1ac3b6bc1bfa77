"""``dtrain health``: how fast the nodes of a job are, and which of them to leave out."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dtrain.cli.trials import NOT_DONE, NOT_PASSED, refusing
from dtrain.errors import ConfigError, LaunchError


def health(
    keep: Annotated[
        int | None, typer.Option(min=1, help="Choose so many nodes: not the slowest.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Where to write the chosen ones, a name in a line.")
    ] = None,
    within: Annotated[float, typer.Option(help="Seconds in which nodes must have come.")] = 30.0,
) -> None:
    """Measure the nodes of a job, and name those that are slower than half the median.

    Start it on each node: `srun --ntasks-per-node=1 dtrain health`.

    Exit status: 0 if all nodes are in order, or so many were chosen; 1 if not; 2 if they could
    not be measured. On other ranks than 0 it is 0.
    """
    from dtrain.distributed import examine_job  # here: it imports torch, and others need none

    with refusing("health", ConfigError, LaunchError):
        if (keep is None) != (file is None):
            raise ConfigError(
                "--keep says how many nodes, and --file where to write them: give both"
            )
        rank, found = examine_job(within)
    if rank != 0:
        return
    if found is None:
        typer.echo(
            "dtrain health: all ranks are on one node: there is nothing to compare", err=True
        )
        raise typer.Exit(NOT_DONE)
    console = Console(markup=False, highlight=False, emoji=False)
    table = Table("node", "GFLOP/s", "MB/s")
    for node in found.nodes:
        table.add_row(node.name, *node.figures(), style="red" if node.trouble else None)
    console.print(table)
    for words in found.findings or ["no node is slower than half the median"]:
        typer.echo(words)
    if keep is None or file is None:
        raise typer.Exit(NOT_PASSED if found.findings else 0)
    chosen = found.best(keep)
    file.write_text("".join(f"{name}\n" for name in chosen))
    left_out = [node.name for node in found.nodes if node.name not in chosen]
    typer.echo(f"chosen: {' '.join(chosen)}; left out: {' '.join(left_out) or 'none'}")
    if len(chosen) < keep:
        few = f"dtrain health: only {len(chosen)} of the {keep} nodes that are wanted answers"
        typer.echo(few, err=True)
        raise typer.Exit(NOT_PASSED)
