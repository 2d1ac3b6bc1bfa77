"""The ``dtrain`` command. Each of its commands is a module here, added in ``main``."""

import typer

from dtrain.cli.check import check
from dtrain.cli.drill import drill
from dtrain.cli.export import export
from dtrain.cli.submit import submit

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
app.command()(export)


@app.callback()
def _commands() -> None:
    """Small distributed PyTorch training: the same numbers on any number of ranks."""


def main() -> None:
    """Runs the command line."""
    app()
