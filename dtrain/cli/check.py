"""``dtrain check``: does a script train the same on one rank and on several?"""

from typing import Annotated

import typer

from dtrain.cli.show import Script, ScriptArgs, show
from dtrain.errors import ConfigError
from dtrain.trials import check_equivalence


def check(
    script: Script,
    args: ScriptArgs = None,
    ranks: Annotated[int, typer.Option(help="Compare one rank with so many.")] = 2,
    micro_batches: Annotated[
        str, typer.Option(help="Compare so many micro-batches a rank; commas between.")
    ] = "1,2",
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds that a run may take.")] = 300.0,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="Take this out of all runs and compare the rest: dropout, batchnorm, "
            "augmentation or mixup. May be given several times."
        ),
    ] = None,
) -> None:
    """Find out whether a script trains alike on any number of ranks.

    It takes a few steps on 1 and on several ranks, with several micro-batches, and says where
    numbers part, and why.

    Exit status: 0 if the numbers are equal, 1 if they part, 2 if the script could not be checked.
    """
    show(
        "check",
        lambda progress: check_equivalence(
            script,
            args or (),
            ranks=ranks,
            micro_batches=_numbers(micro_batches),
            steps=steps,
            timeout_s=timeout,
            allow=allow or (),
            progress=progress,
        ),
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--micro-batches {text}: numbers with commas, such as 1,2") from None
