"""The ``dtrain`` command. What it does is in modules here, and added in ``main``."""

import gc
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.ablate import InOrder, ablate
from dtrain.cli.doctor import doctor
from dtrain.cli.health import health
from dtrain.cli.report import report
from dtrain.cli.runs import ls
from dtrain.cli.submit import submit
from dtrain.cli.tables import compare
from dtrain.cli.trials import check, drill, refusing
from dtrain.errors import CheckpointError, ConfigError

app = typer.Typer(
    name="dtrain",
    help="Small distributed PyTorch training: the same numbers on any number of ranks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # a traceback as Python shows it, to search for
)
# All after a script's name is the script's own, options included.
for command in (check, drill, submit):
    app.command(context_settings={"allow_interspersed_args": False})(command)

app.command(cls=InOrder, context_settings={"ignore_unknown_options": True})(ablate)
app.command()(compare)
app.command()(doctor)
app.command()(health)
app.command()(report)
app.command()(ls)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    file: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    which: Annotated[
        str,
        typer.Option(help="final (those that count), raw, averaged, best, or a step's number."),
    ] = "final",
) -> None:
    """Write the weights of a run's newest intact checkpoint as one plain safetensors file.

    Exit status: 0 if it was written, 2 if not.
    """
    from dtrain.checkpoint import export_model  # here: it imports torch, and others need none

    with refusing("export", CheckpointError, ConfigError):
        wanted = int(which) if which.isdecimal() else which
        count = export_model(run, file, which=wanted)  # type: ignore[arg-type]
    typer.echo(f"{file}: {count} tensors")


@app.command()
def show(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Say where a run stands, which checkpoints it has, and which weights count.

    Exit status: 0, or 2 if there is no intact checkpoint.
    """
    from dtrain.checkpoint import describe_run

    with refusing("show", CheckpointError):
        typer.echo(describe_run(run))


def main() -> None:
    """Runs the command line."""
    try:
        app()
    finally:
        gc.freeze()  # torch's objects are not looked through at the end, which takes 0.3 s
