"""``dtrain submit``: trains a script on a SLURM cluster."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.trials import Script, ScriptArgs, refusing
from dtrain.cluster import Kind, render
from dtrain.errors import ConfigError


def submit(
    script: Script,
    args: ScriptArgs = None,
    nodes: Annotated[int, typer.Option(min=1, help="So many nodes.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each node, and so ranks.")] = 0,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks of each node; 1 where there are no GPUs.")
    ] = None,
    cpus: Annotated[
        int | None,
        typer.Option(min=1, help="CPUs of each node; of several, whole nodes are taken otherwise."),
    ] = None,
    time: Annotated[str | None, typer.Option(help="The job's limit, such as 4:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="SLURM's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM's account.")] = None,
    name: Annotated[str | None, typer.Option(help="The job's name; the script's if left out.")] = (
        None
    ),
    torchrun: Annotated[bool, typer.Option(help="Start ranks by torchrun, or by srun.")] = True,
    spares: Annotated[
        int,
        typer.Option(min=0, help="So many nodes more, to leave out the slowest before training."),
    ] = 0,
    health: Annotated[
        bool, typer.Option(help="Measure nodes before training, and name slow ones.")
    ] = True,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            help="Any other option of sbatch, such as constraint=a100. May be given several times."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the batch script, and do no more.")] = False,
) -> None:
    """Submit a script as a SLURM job, which saves and requeues itself before its time is up.

    Options come before the script's name: all after it is the script's own.

    Exit status: 0 if the job is submitted; sbatch's own if it refuses; 2 if it could not be asked.
    """
    with refusing("submit", ConfigError):
        given = dict(_option(text) for text in sbatch or ())
        if not script.is_file():
            raise ConfigError(f"there is no script '{script}' (seen from {Path.cwd()})")
        options: dict[str, str | None] = {
            "job-name": name or script.stem,
            "nodes": str(nodes + spares),
        }
        options["gpus-per-node"] = str(gpus) if gpus else None
        options["cpus-per-task"] = None if cpus is None else str(cpus)
        options |= {"time": time, "partition": partition, "account": account}
        if cpus is not None:
            options["exclusive"] = None
        kind: Kind = "one_node" if nodes + spares == 1 else "many_nodes"
        tasks = ranks or gpus or 1
        if not torchrun:
            kind = "srun_per_gpu"
            options["ntasks-per-node"] = str(tasks)
            options["cpus-per-task"] = None if cpus is None else str(max(1, cpus // tasks))
        options |= given
        if spares and not (torchrun and health):
            raise ConfigError("--spares needs torchrun, and nodes that are measured")
        command = [str(script), *(args or ())]
        tasks_of_torchrun = tasks if torchrun else None
        text = render(
            kind,
            options=options,
            command=command,
            python=sys.executable,
            ranks=tasks_of_torchrun,
            spares=spares,
            health=health,
        )
    if dry_run:
        typer.echo(text, nl=False)
        return
    job = _submit(text)
    log = (given.get("output") or "%x-%j.log").replace("%x", options["job-name"] or "")
    log = os.path.join(Path.cwd(), log.replace("%j", job))
    typer.echo(
        f"job   {job}: {shlex.join(command)}\n"
        f"log   {log}\n"
        f"see   tail -F {shlex.quote(log)}      what it says, once it has begun\n"
        f"      squeue --job {job}      where it stands\n"
        f"      scancel --batch --signal=USR1 {job}      have it save and start again\n"
        f"      scancel {job}      end it; it saves first, if SLURM leaves it the time"
    )


def _option(text: str) -> tuple[str, str]:
    name, _, value = text.removeprefix("--").partition("=")
    if not name or name != name.strip() or "\n" in text:
        raise ConfigError(f"--sbatch {text!r}: write one option of sbatch, such as constraint=a100")
    return name, value


def _submit(text: str) -> str:
    """Returns the job's number."""
    with refusing("submit", ConfigError):
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "there is no sbatch on the PATH. Run this on a machine from which jobs are "
                "submitted, or see the batch script with --dry-run."
            )
    done = subprocess.run(
        ["sbatch", "--parsable"], input=text, capture_output=True, text=True, check=False
    )
    typer.echo(done.stderr, err=True, nl=False)  # in its own words
    if done.returncode != 0:
        raise typer.Exit(done.returncode)
    return done.stdout.strip().partition(";")[0]  # a cluster's name may follow
