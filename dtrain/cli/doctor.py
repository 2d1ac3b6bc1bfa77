"""``dtrain doctor``: whether a run would work here."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.trials import NOT_PASSED

_STYLES = {"note": typer.colors.YELLOW, "wrong": typer.colors.RED}


def doctor(
    run_dir: Annotated[Path, typer.Option(help="Where runs are to write.")] = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print it as JSON, for a request for help.")
    ] = False,
) -> None:
    """Look at all that a run needs, and say what to do about what is wrong.

    Alone, or as a run is started: torchrun --nproc-per-node 2 -m dtrain doctor; srun dtrain doctor.
    On several hosts, give --run-dir as a path on their shared file system.

    Exit status: 0 if a run would work, 1 if not.
    """
    from dtrain.doctor import examine  # here: it imports torch, and others need none

    found = examine(run_dir.absolute())
    if found.is_main and as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
    elif found.is_main:
        for finding in found.findings:
            typer.secho(str(finding), fg=_STYLES.get(finding.level))
            if finding.remedy:
                typer.echo(f"{'':<22}-> {finding.remedy}")
        typer.echo("a run would work here" if found.works else "a run would not work here")
    if not found.works:
        raise typer.Exit(NOT_PASSED)
