"""``dtrain drill``: does a script's training survive being killed?"""

from typing import Annotated

import typer

from dtrain.cli.show import Script, ScriptArgs, show
from dtrain.trials import drill_script


def drill(
    script: Script,
    args: ScriptArgs = None,
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
    show(
        "drill",
        lambda progress: drill_script(
            script,
            args or (),
            ranks=ranks,
            kills=kills,
            steps=steps,
            seed=seed,
            timeout_s=timeout,
            other_ranks=other_ranks,
            progress=progress,
        ),
    )
