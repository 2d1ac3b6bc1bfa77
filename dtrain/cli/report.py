"""``dtrain report``: a page about runs, to be looked at in a browser."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.trials import refusing
from dtrain.errors import ConfigError


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs; or of a study, or one that holds runs.")
    ],
    file: Annotated[
        Path | None,
        typer.Option("--to", help="The page; report.html beside the first run's files."),
    ] = None,
    watch: Annotated[
        float | None, typer.Option(min=1, help="Write it anew every so many seconds.")
    ] = None,
) -> None:
    """Make one HTML page of runs: curves, events, samples, settings, and how they differ.

    It needs no server and no network, and may be sent to somebody. Also while a run is under way.

    Exit status: 0 if it was written, 2 if not.
    """
    from dtrain.report import make_page, read_runs  # here: others need none of it
    from dtrain.trials import table_of_study

    def write() -> Path:
        folders, study = _runs_of(runs)
        page = make_page(read_runs(folders), table_of_study(study).report if study else None)
        to = file or runs[0] / "report.html"
        aside = to.with_name(f".{to.name}.writing")
        try:
            aside.write_text(page, encoding="utf-8")
            os.replace(aside, to)  # a browser may be reading it
        except OSError as error:
            raise ConfigError(f"{to} cannot be written: {error}") from error
        return to

    with refusing("report", ConfigError):
        to = write()
        typer.echo(f"{to}: {to.stat().st_size / 1e6:.1f} MB")
        if watch is not None:
            typer.echo(f"written anew every {watch:g} s, until Ctrl-C")
            _again(write, watch)


def _again(write: Callable[[], Path], every_s: float) -> None:
    try:
        while not threading.Event().wait(every_s):
            write()
    except KeyboardInterrupt:
        return


def _runs_of(given: list[Path]) -> tuple[list[Path], Path | None]:
    """Returns the runs' folders; those within, where one is no run itself; and a study, if any."""
    folders: list[Path] = []
    study = None
    for folder in given:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder")
        if (folder / "study.json").is_file():
            study = folder
            folders += sorted(one.parent for one in folder.glob("*/seed-*/*.jsonl"))
        elif (folder / "status.json").is_file() or [*folder.glob("*.jsonl")]:
            folders.append(folder)
        else:
            within = sorted(one.parent for one in folder.glob("*/status.json"))
            if not within:
                raise ConfigError(f"{folder} is no run, and holds none: there is no status.json")
            folders += within
    return folders, study
