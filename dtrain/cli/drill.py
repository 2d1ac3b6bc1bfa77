"""``dtrain drill``: does a script's training survive being killed?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.show import show
from dtrain.errors import CheckError, ConfigError
from dtrain.trials import drill as drill_script
from dtrain.trials.drill.report import COLUMNS, headline, paragraphs, rows

DIFFERS, NOT_DRILLED, INTERRUPTED = 1, 2, 130


def drill(
    script: Annotated[Path, typer.Argument(help="A script that calls Trainer(...).fit(...).")],
    args: Annotated[
        list[str] | None, typer.Argument(help="The script's own arguments, as they are.")
    ] = None,
    ranks: Annotated[int, typer.Option(help="Run it on so many ranks.")] = 2,
    kills: Annotated[
        int, typer.Option(help="Kills in a step; half as many more fall on a save.")
    ] = 3,
    steps: Annotated[int, typer.Option(help="Steps of each run, at most.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the steps, ranks and moments of kills.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds that one start may take.")] = 300.0,
    other_ranks: Annotated[
        int | None, typer.Option(help="In one more trial, go on with so many ranks.")
    ] = None,
) -> None:
    """Find out whether a script's training survives being killed.

    It is run undisturbed, then killed (all ranks, one rank, in the middle of a save) and
    preempted, each time started again, and what it ends with is compared.

    Exit status: 0 if all trials ended alike, 1 if one did not, 2 if the script could not be
    drilled.
    """
    try:
        found = drill_script(
            script,
            args or (),
            ranks=ranks,
            kills=kills,
            steps=steps,
            seed=seed,
            timeout_s=timeout,
            other_ranks=other_ranks,
            progress=lambda words: typer.echo(f"  {words} ...", err=True),
        )
    except (CheckError, ConfigError) as error:
        typer.echo(f"dtrain drill: {error}", err=True)
        raise typer.Exit(NOT_DRILLED) from error
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None  # not 1, which would mean a difference
    flags = [trial.passed for trial in found.trials]
    show(str(found), headline(found), found.passed, COLUMNS, rows(found), flags, paragraphs(found))
    if not found.passed:
        raise typer.Exit(DIFFERS)
