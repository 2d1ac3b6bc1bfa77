"""``dtrain submit``: trains a script on a SLURM cluster."""

import getpass
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dtrain.cli.run_status import describe
from dtrain.cli.trials import Script, ScriptArgs, refusing
from dtrain.cluster import Kind, lacking, log_path, render
from dtrain.errors import ConfigError

Options = dict[str, str | None]

# What the batch script listens to; others would kill it, or torchrun.
_SIGNAL = re.compile(r"(R?B|BR):((SIG)?USR1|10)(@\d+)?", re.IGNORECASE)


def _show_status(run_dir: Path | None) -> None:
    if run_dir is not None:
        with refusing("submit", ConfigError):
            typer.echo(describe(run_dir))
        raise typer.Exit


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
    status: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=_show_status,
            metavar="RUN_DIR",
            help="Say where a run and its job stand, and do no more.",
        ),
    ] = None,
) -> str | None:
    """Submit a script as a SLURM job, which saves and requeues itself before its time is up.

    Options come before the script's name: all after it is the script's own.

    Exit status: 0 if the job is submitted; sbatch's own if it refuses; 2 if it could not be asked.
    """
    with refusing("submit", ConfigError):
        given = dict(_option(text) for text in sbatch or ())
        if not script.is_file():
            raise ConfigError(f"there is no script '{script}' (seen from {Path.cwd()})")
        options: Options = {"job-name": name or script.stem, "nodes": str(nodes + spares)}
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
        is_array = "array" in given
        if is_array and "output" not in given:
            options["output"] = "%x-%A_%a.log"
        folder = Path.cwd() / (given.get("chdir") or "")
        # Seen from where the job runs.
        command = [str(script.absolute() if "chdir" in given else script), *(args or ())]
        _check(script, command, given, folder)
        if "qos" not in given and "reservation" not in given:  # which may have limits of their own
            what = lacking(
                partition=options["partition"],
                nodes=int(re.match(r"\d*", options["nodes"] or "")[0] or 1),  # type: ignore[index]
                time=options["time"],
                gpus=gpus,
                cpus=cpus or (1 if torchrun else tasks),
            )
            if what:
                raise ConfigError(f"SLURM would let this job wait for ever: {what}.")
        if spares and not (torchrun and health):
            raise ConfigError("--spares needs torchrun, and nodes that are measured")
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
    _warn_of_own(args or ())
    if dry_run:
        typer.echo(text, nl=False)
        return None
    for key in ("output", "error"):
        _make_folder(options.get(key) or "", options, folder)
    job = _submit(text)
    log = _log_path(options.get("output") or "%x-%j.log", options, folder, job)
    first = re.match(r"\d*", given["array"])[0] or "0" if is_array else ""  # type: ignore[index]
    one = f"{job}_{first}" if is_array else job
    typer.echo(
        f"job   {job}: {shlex.join(command)}\n"
        f"log   {log}\n"
        f"see   tail -F {_for_shell(log)}      what it says, once it has begun\n"
        f"      squeue --job {job}      where it stands\n"
        f"      scancel --batch --signal=USR1 {one}      have it save and start again\n"
        f"      scancel {one}      end it; it saves first, if SLURM leaves it the time"
    )
    if is_array:
        typer.echo(
            f"      {one} is task {first} of the array {given['array']}; scancel {job} ends all of "
            "them"
        )
    return job


def _check(script: Path, command: list[str], given: dict[str, str], folder: Path) -> None:
    """Refuses what would start, and then go wrong."""
    if "signal" in given and not _SIGNAL.fullmatch(given["signal"]):
        raise ConfigError(
            f"--sbatch signal={given['signal']}: write signal=B:USR1@120, seconds as you like. "
            "Without B: it goes to the job's steps and kills torchrun, and not to the batch "
            "script, which has the ranks save; and USR1 is what that script listens to."
        )
    if not folder.is_dir():
        raise ConfigError(
            f"--sbatch chdir={given['chdir']}: there is no such folder, and SLURM would run the "
            "job in /tmp instead"
        )
    told = any("{task}" in word for word in command) or "array" not in given
    if not told and "SLURM_ARRAY_TASK_ID" not in script.read_text(errors="replace"):
        raise ConfigError(
            f"--sbatch array={given['array']}: all tasks would do the same, and write to one "
            "run_dir. Write {task} where a task's number is to stand in the script's arguments, "
            f"such as {script.name} --run-dir 'runs/sweep-{{task}}', or have the script look at "
            "SLURM_ARRAY_TASK_ID."
        )


def _warn_of_own(args: Sequence[str]) -> None:
    """Says which of the script's arguments look like ours: they are passed on as they are."""
    own = {"--dry-run", "--sbatch", "--partition", "--account", "--torchrun", "--no-torchrun"}
    own |= {f"--{name}" for name in ("nodes", "gpus", "ranks", "cpus", "time", "name", "status")}
    if found := [word for word in args if word.partition("=")[0] in own]:
        typer.echo(
            f"dtrain submit: warning: {', '.join(found)} comes after the script's name, so it is "
            "passed to the script. Options of dtrain submit come before.",
            err=True,
        )


def _log_path(pattern: str, options: Options, folder: Path, job: str) -> Path:
    name, array = options["job-name"] or "", "array" in options
    user = getpass.getuser()
    return log_path(pattern, job=job, name=name, user=user, array=array, folder=folder)


def _make_folder(pattern: str, options: Options, folder: Path) -> None:
    """Makes the log's folder: where it is missing, SLURM drops what a job says, without a word."""
    with refusing("submit", ConfigError):
        where = _log_path(pattern, options, folder, "*").parent
        if "*" in str(where):
            raise ConfigError(
                f"--sbatch output={pattern}: the log's folder must be there before the job has a "
                "number, else SLURM drops the log. Write, say, output=logs/%x-%j.log"
            )
        try:
            where.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the log's folder {where} cannot be made: {error}") from error


def _for_shell(path: Path) -> str:
    return "*".join(shlex.quote(part) if part else "" for part in str(path).split("*"))


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
