"""The ``dtrain`` command. What it does is in modules here, and added in ``main``."""

from pathlib import Path
from typing import Annotated

import typer

from dtrain.checkpoint import export_model
from dtrain.cli.submit import submit
from dtrain.cli.trials import check, drill, refusing
from dtrain.errors import CheckpointError

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


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    file: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Write the weights of a run's newest intact checkpoint as one plain safetensors file.

    Exit status: 0 if it was written, 2 if not.
    """
    with refusing("export", CheckpointError):
        count = export_model(run, file)
    typer.echo(f"{file}: {count} tensors")


def main() -> None:
    """Runs the command line."""
    app()
