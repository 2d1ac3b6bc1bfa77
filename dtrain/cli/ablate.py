"""``dtrain ablate``: what each tweak of a training is worth, in one command."""

import difflib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dtrain.cli.submit import submit
from dtrain.cli.tables import AsJSON, AsMarkdown, Mode, show_table
from dtrain.cli.trials import INTERRUPTED, refusing
from dtrain.errors import CheckError, ConfigError
from dtrain.trials import RUN_OF_STUDY, Change, Variant, listed_seeds, run_and_show, study_runner

_KINDS = ("without", "set", "arg")
_CHANGES = "changes"


class InOrder(TyperCommand):
    """Notes in which order changes are given: those after a --variant are its own.

    Options may stand after the script's name, too; what is not known is the script's.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Does, and looks whose the options are."""
        own, script = (args, []) if "--" not in args else _split(args)
        options, _, order = self.make_parser(ctx).parse_args(list(own))
        values = {name: list(options.get(name) or ()) for name in ("variant", *_KINDS)}
        ctx.meta[_CHANGES] = [
            (one.name, values[one.name].pop(0)) for one in order if values.get(one.name or "")
        ]
        if not script:
            self._check_whose(ctx, own)
        return super().parse_args(ctx, [*own, "--", *script] if script else own)

    def _check_whose(self, ctx: Any, args: list[str]) -> None:
        """Refuses an option after the script's name that the script may have as well."""
        # Options before it are ours, as all would be if none could stand after it.
        ctx.allow_interspersed_args = False
        options, _, _ = self.make_parser(ctx).parse_args(list(args))
        ctx.allow_interspersed_args = True
        script = Path(options.get("script") or "")
        if not script.is_file():
            return  # which is said in a moment
        text = script.read_text(errors="replace")
        ours = {name for one in self.params for name in one.opts if name.startswith("--")}
        for word in options.get("args") or ():
            name = word.partition("=")[0]
            is_its = re.search(rf"""["']{re.escape(name)}["']""", text)
            close = difflib.get_close_matches(name, ours, 1, 0.8)
            if name.startswith("--") and name not in ours and close and not is_its:
                raise typer.BadParameter(
                    f"{name}: did you mean {close[0]}? If it is {script}'s own, write it after --"
                )
            if name in ours and is_its:
                raise typer.BadParameter(
                    f"{name} stands after {script}, which seems to have an option {name} as well: "
                    f"put those of dtrain ablate before {script}, and the script's after -- at the "
                    f"end (dtrain ablate {name} ... {script} -- {name} ...)"
                )


def _split(args: list[str]) -> tuple[list[str], list[str]]:
    place = args.index("--")
    return args[:place], args[place + 1 :]


def ablate(
    ctx: typer.Context,
    script: Annotated[Path, typer.Argument(help="A script that calls Trainer(...).fit(...).")],
    args: Annotated[
        list[str] | None,
        typer.Argument(help="The script's own arguments; after -- all are the script's."),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="CALLBACK", help="Leave it out; EMA#2 is the second of that class."),
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT=VALUE",
            help="An argument of a callback (EMA.decay=0.9) or of the optimizer (optimizer.lr=1).",
        ),
    ] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option(metavar="ARGUMENTS", help='More of the script\'s, as --arg="--lr 0.01".'),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="One variant of all changes that follow, up to the next --variant."
        ),
    ] = None,
    each: Annotated[bool, typer.Option("--each", help="Leave out every callback in turn.")] = False,
    pairs: Annotated[bool, typer.Option("--pairs", help="Also leave out two at a time.")] = False,
    only: Annotated[
        bool, typer.Option("--only", help="Compare with no callbacks, and add one at a time.")
    ] = False,
    seeds: Annotated[str, typer.Option(help="So many, from 0; or these, as 3,7,11.")] = "5",
    metric: Annotated[
        str | None, typer.Option(help="What to compare; by default what the script judges by.")
    ] = None,
    mode: Mode = None,
    at: Annotated[
        str,
        typer.Option(
            help="final, best, steps or time (where all have come to), steps=500, time=60, or "
            "evaluate (what the script's last Trainer.evaluate returned)."
        ),
    ] = "final",
    folder: Annotated[
        Path | None, typer.Option(help="Where the study is; runs/ablate-SCRIPT by default.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="So many runs at a time; 1 here, with --slurm no limit.")
    ] = None,
    ranks: Annotated[int, typer.Option(help="Of each run.")] = 1,
    timeout: Annotated[float | None, typer.Option(help="Seconds that a run may take.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what has failed.")] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Run all as one array of SLURM jobs.")
    ] = False,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="With --slurm: an option of sbatch, such as gpus-per-node=1."),
    ] = None,
    markdown: AsMarkdown = False,
    json: AsJSON = False,
) -> None:
    """Find out what each tweak of a script's training is worth.

    It trains the script as it is and with changes, on several seeds, and compares. Nothing in the
    script changes. Called again it goes on where it was, and takes in new seeds and variants.

    Exit status: 0 if there is a table, 2 if not.
    """
    try:
        with refusing("ablate", CheckError, ConfigError):
            _check_where(slurm, sbatch or (), timeout)
            say = _progress
            runner = study_runner(script, args or (), folder, jobs or 1, ranks, timeout, retry, say)
            runner.elsewhere = slurm
            with runner.folder.locked(), runner:
                due = runner.plan(
                    _variants(ctx.meta[_CHANGES]),
                    _seeds(seeds),
                    (metric, mode, at),
                    each=each,
                    pairs=pairs,
                    only=only,
                )
                if slurm and due:
                    _submit(runner, due, jobs, sbatch or [])
                    return
                study = run_and_show(runner, due)
    except KeyboardInterrupt:
        typer.echo("dtrain ablate: interrupted; the same command goes on where it was", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if sys.stderr.isatty():
        typer.echo("\r\x1b[K", err=True, nl=False)
    show_table(study.report, markdown=markdown, json=json)
    typer.echo(f"\nfiles and picture are in {os.path.relpath(study.folder)}", err=True)


def _check_where(slurm: bool, sbatch: Sequence[str], timeout: float | None) -> None:
    """Refuses what does not go with where the runs are to be."""
    if not slurm:
        if sbatch:
            raise ConfigError("--sbatch is for --slurm")
        return
    if any(one.removeprefix("--").partition("=")[0] == "array" for one in sbatch):
        raise ConfigError(
            "--sbatch array: the array's tasks are the study's runs that are missing. Write "
            "--jobs 4 for four of them at a time"
        )
    if timeout is not None:
        raise ConfigError(
            "--timeout is for runs on this machine. With --slurm write a job's limit, such as "
            "--sbatch time=30:00; what is not done by then is requeued, and goes on"
        )


def _progress(words: str) -> None:
    if sys.stderr.isatty():  # in one line, for there may be hundreds
        typer.echo(f"\r\x1b[K  {words} ...", err=True, nl=False)
    else:
        typer.echo(f"  {words} ...", err=True)


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"--seeds {text}: a number of seeds, or seeds such as 3,7,11") from None
    return listed_seeds(numbers if "," in text else numbers[0] if numbers else 0)


def _variants(taken: list[tuple[str, str]]) -> list[Variant]:
    """Returns the variants that are asked for, from options in the order in which they stand."""
    found: list[Variant] = []
    named: tuple[str, list[Change]] | None = None
    for kind, text in [*taken, ("variant", "")]:
        if kind != "variant":
            change = Change.parse(kind, text)  # type: ignore[arg-type]
            if named is None:
                found.append(Variant.of([change]))
            else:
                named[1].append(change)
            continue
        if named is not None:
            if not named[1]:
                raise ConfigError(
                    f"--variant {named[0]!r}: name what it changes after it, such as --variant "
                    f"{named[0]!r} --without EMA"
                )
            found.append(Variant.of(named[1], named[0]))
        named = (text, []) if text else None
    return found


def _submit(runner: Any, due: list[tuple[str, int]], jobs: int | None, sbatch: list[str]) -> None:
    """Submits what is due as one array of jobs, so many at a time."""
    folder, numbers = runner.folder.path, [runner.note.runs.index(one) for one in due]
    for one in due:
        runner.folder.prepare_run(*one)
    tasks = ",".join(map(str, numbers))
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        tasks = f"{numbers[0]}-{numbers[-1]}"
    tasks += f"%{jobs}" if jobs else ""
    # Of its folder's name SLURM replaces nothing.
    output = str(folder).replace("%", "%%") + "/slurm-%a.log"
    job = submit(
        RUN_OF_STUDY,
        [str(folder), "{task}"],
        ranks=runner.ranks,
        name=f"ablate-{runner.script.stem}",
        sbatch=[f"array={tasks}", f"output={output}", *sbatch],
    )
    runner.note.jobs.append(job)
    runner.folder.write(runner.note)
    typer.echo(
        f"runs  {len(due)}, a task each, which names its run in its log's first line\n"
        f"then  dtrain compare {shlex.quote(os.path.relpath(folder))}      the table of what there "
        "is so far\n"
        "      the same command again: submits what is missing; where nothing is, writes the "
        "table and the picture"
    )
