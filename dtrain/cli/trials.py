"""``dtrain check`` and ``dtrain drill``: a trial of a script, and its report."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dtrain.errors import CheckError, ConfigError, DtrainError
from dtrain.trials import Drilled, Equivalence, check_equivalence, drill_script

NOT_PASSED, NOT_DONE, INTERRUPTED = 1, 2, 130

#: What a trial of a script takes.
Script = Annotated[Path, typer.Argument(help="A script that calls Trainer(...).fit(...).")]
ScriptArgs = Annotated[
    list[str] | None, typer.Argument(help="The script's own arguments, as they are.")
]


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
    with refusing("check", ConfigError):
        try:
            numbers = [int(word) for word in micro_batches.split(",")]
        except ValueError:
            wanted = "numbers with commas, such as 1,2"
            raise ConfigError(f"--micro-batches {micro_batches}: {wanted}") from None
    options: dict[str, Any] = {"ranks": ranks, "steps": steps, "timeout_s": timeout}
    options |= {"micro_batches": numbers, "allow": allow or ()}
    _show("check", check_equivalence, script, args, options)


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
    options: dict[str, Any] = {"ranks": ranks, "steps": steps, "timeout_s": timeout}
    options |= {"kills": kills, "seed": seed, "other_ranks": other_ranks}
    _show("drill", drill_script, script, args, options)


@contextmanager
def refusing(command: str, *errors: type[DtrainError]) -> Iterator[None]:
    """Says what a command could not do, and ends it with status 2."""
    try:
        yield
    except errors as error:
        typer.echo(f"dtrain {command}: {error}", err=True)
        raise typer.Exit(NOT_DONE) from error


def _show(
    command: str,
    trial: Callable[..., Equivalence | Drilled],
    script: Path,
    args: list[str] | None,
    options: dict[str, Any],
) -> None:
    """Prints what a trial finds: in colours at a terminal, else as text. Ranks: none."""
    try:
        with refusing(command, CheckError, ConfigError):
            options["progress"] = lambda words: typer.echo(f"  {words} ...", err=True)
            report = trial(script, args or (), **options).report
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None  # not 1, which would be a finding
    # Names of tensors and files are no markup.
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        typer.echo(str(report))
    else:
        console.print(report.headline, style="bold green" if report.passed else "bold red")
        table = Table(*report.columns)
        for row, good in report.rows:
            table.add_row(*row, style=None if good else "red")
        console.print(table)
        for paragraph in report.paragraphs:
            console.print(paragraph, soft_wrap=True)
            console.print()
    if not report.passed:
        raise typer.Exit(NOT_PASSED)
