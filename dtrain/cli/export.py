"""``dtrain export``: a run's weights as one plain file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dtrain.checkpoint import export_model
from dtrain.errors import CheckpointError

NOT_EXPORTED = 2


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    file: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Write the weights of a run's newest intact checkpoint as one plain safetensors file.

    Exit status: 0 if it was written, 2 if not.
    """
    try:
        count = export_model(run, file)
    except CheckpointError as error:
        typer.echo(f"dtrain export: {error}", err=True)
        raise typer.Exit(NOT_EXPORTED) from error
    typer.echo(f"{file}: {count} tensors")
