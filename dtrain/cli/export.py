"""``dtrain export``: a run's weights as one plain file."""

from pathlib import Path
from typing import Annotated

import typer

from dtrain.checkpoint import export_model
from dtrain.cli.show import refusing
from dtrain.errors import CheckpointError


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
