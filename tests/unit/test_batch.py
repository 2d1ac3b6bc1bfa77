"""Batch scripts for SLURM, and the command that submits them; without a SLURM."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from dtrain.cli import app
from dtrain.cluster import log_path
from dtrain.cluster.batch import Kind, render
from dtrain.cluster.slurm import minutes
from dtrain.errors import ConfigError

ROOT = Path(__file__).parents[2]
KINDS = get_args(Kind)


def directives(text: str) -> list[str]:
    return [
        line.removeprefix("#SBATCH ").split(" #")[0].strip()
        for line in text.splitlines()
        if line.startswith("#SBATCH ")
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_repositorys_files_are_what_is_rendered(kind: Kind) -> None:
    written = (ROOT / "slurm" / f"{kind}.sbatch").read_text()
    assert written == render(kind), "run tools/write_sbatch.py"


def test_there_is_no_other_file() -> None:
    found = sorted(path.name for path in (ROOT / "slurm").glob("*.sbatch"))
    assert found == sorted(f"{kind}.sbatch" for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_bash_can_read_it(kind: Kind) -> None:
    text = render(kind, command=["it's.py", "$HOME", "a b"], python="/a b/python", ranks=2)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert """set -- 'it'"'"'s.py' '$HOME' 'a b'""" in text
    assert "PYTHON='/a b/python'\nRANKS=2\n" in text


def test_options_come_instead_of_its_own_beside_them_or_not_at_all() -> None:
    text = render("many_nodes", options={"nodes": "7", "exclusive": None, "comment": "a b"})
    assert directives(text) == [
        "--job-name=dtrain",
        "--nodes=7",
        "--ntasks-per-node=1",
        "--output=%x-%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@120",
        "--comment='a b'",
    ]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="kind='two': choose one of one_node, many_nodes"):
        render("two")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ dtrain submit


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "train.py").touch()
    return str(tmp_path / "train.py")


def dry(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["submit", "--dry-run", *arguments])
    return done.exit_code, done.output


def test_it_prints_what_it_would_submit(script: str) -> None:
    options = ["--nodes=2", "--gpus=8", "--time=4:00:00", "--partition=gpu", "--sbatch=qos=low"]
    code, text = dry(*options, script, "--nodes", "3")
    assert code == 0
    assert f"\nPYTHON={sys.executable}\nRANKS=8\nset -- {script} --nodes 3\n" in text
    assert "-m dtrain.cluster.torchrun" in text
    assert "warning: --nodes comes after the script's name, so it is passed to the script" in text
    assert directives(text) == [
        "--job-name=train",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--exclusive",
        "--output=%x-%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@120",
        "--gpus-per-node=8",
        "--time=4:00:00",
        "--partition=gpu",
        "--qos=low",
    ]


def test_spares_are_nodes_beyond_those_that_the_run_needs(script: str) -> None:
    code, text = dry("--nodes=4", "--spares=2", script)
    assert code == 0
    assert "--nodes=6" in directives(text)
    assert "\nnodes=$((SLURM_NNODES - 2)) first=" in text
    assert '--nnodes="$nodes"' in text
    assert 'SLURM_NNODES"' not in text
    assert "export DTRAIN_HEALTH=off" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert "--nnodes" in dry("--nodes=1", "--spares=1", script)[1]


def test_health_may_be_switched_off(script: str) -> None:
    assert "\nexport DTRAIN_HEALTH=off\n" in dry("--nodes=2", "--no-health", script)[1]
    assert "DTRAIN_HEALTH" not in dry("--nodes=2", script)[1]


@pytest.mark.parametrize("more", ["--no-torchrun", "--no-health"])
def test_spares_have_to_be_measured(script: str, more: str) -> None:
    code, text = dry("--nodes=2", "--spares=1", more, script)
    assert (code, text) == (
        2,
        "dtrain submit: --spares needs torchrun, and nodes that are measured\n",
    )


def test_one_node_has_no_spares() -> None:
    with pytest.raises(ConfigError, match="spares: they are for torchrun on several nodes"):
        render("one_node", spares=1)


def test_without_torchrun_a_rank_is_a_task(script: str) -> None:
    code, text = dry("--no-torchrun", "--ranks=4", "--cpus=8", script)
    assert code == 0
    assert "torch.distributed.run" not in text
    assert "cluster.torchrun" not in text
    told = directives(text)
    assert told[1:3] == ["--nodes=1", "--ntasks-per-node=4"]
    assert "--cpus-per-task=2" in told
    assert "--exclusive" not in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothere.py"], "there is no script 'nothere.py'"),
        (["--sbatch=--", "SCRIPT"], "--sbatch '--': write one option of sbatch"),
        (["--sbatch=a\nb", "SCRIPT"], "write one option of sbatch"),
        (["--sbatch=signal=USR1@60", "SCRIPT"], "Without B: it goes to the job's steps"),
        (["--sbatch=signal=B:TERM@60", "SCRIPT"], "USR1 is what that script listens to"),
        (["--sbatch=array=0-9", "SCRIPT", "--run-dir=r"], "write to one run_dir. Write {task}"),
        (["--sbatch=chdir=/no/where", "SCRIPT"], "there is no such folder"),
    ],
)
def test_what_cannot_be_submitted(script: str, arguments: list[str], words: str) -> None:
    code, text = dry(*(script if one == "SCRIPT" else one for one in arguments))
    assert code == 2
    assert text.startswith("dtrain submit: ")
    assert words in text


def test_where_there_is_no_sbatch(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    done = CliRunner().invoke(app, ["submit", script])
    assert done.exit_code == 2
    assert "there is no sbatch on the PATH" in done.output


def test_a_signal_of_ones_own(script: str) -> None:
    for signal in ("B:USR1@600", "B:SIGUSR1", "RB:10@30"):
        code, text = dry(f"--sbatch=signal={signal}", script)
        assert code == 0
        assert f"--signal={signal}" in directives(text)


def test_an_array_gives_each_task_its_number(script: str) -> None:
    code, text = dry("--sbatch=array=0-9", script, "--run-dir", "runs/{task}", "--tag={task}")
    assert code == 0
    assert "--output=%x-%A_%a.log" in directives(text)
    begin = text.index("set -- ")
    lines = text[begin:].split("\n\n", maxsplit=1)[0] + "\nprintf '%s\\n' \"$@\""
    done = subprocess.run(
        ["bash", "-c", lines],
        env={"SLURM_ARRAY_TASK_ID": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [script, "--run-dir", "runs/7", "--tag=7"]
    Path(script).write_text("import os; os.environ['SLURM_ARRAY_TASK_ID']")
    assert dry("--sbatch=array=0-9", script)[0] == 0


def test_where_a_log_goes() -> None:
    def path(pattern: str, array: bool = False) -> str:
        known = {"job": "12", "name": "a b", "user": "me", "folder": Path("/work")}
        return str(log_path(pattern, array=array, **known))  # type: ignore[arg-type]

    assert path("%x-%j.log") == "/work/a b-12.log"
    assert path("logs/%u/%5j-%N%%.out") == "/work/logs/me/00012-*%.out"
    assert path("/abs/%A_%a.log", array=True) == "/abs/12_*.log"
    assert path("%j.log", array=True) == "/work/*.log"
    assert path("x\\%j.log") == "/work/x%j.log"


def test_times_as_slurm_writes_them() -> None:
    told = ["90", "90:30", "4:00:00", "1-12", "1-12:30", "1-00:00:30", "UNLIMITED"]
    assert [minutes(text) for text in told] == [90, 90.5, 240, 2160, 2190, 1440.5, None]


# ----------------------------------------------------- dtrain submit, with stand-ins of SLURM

PARTITIONS = """\
PartitionName=main Default=YES MaxNodes=UNLIMITED MaxTime=1-00:00:00 State=UP TotalNodes=4
PartitionName=long Default=NO MaxNodes=2 MaxTime=UNLIMITED State=UP TotalNodes=40
"""
NODES = """\
main|16|(null)
main|32+|gpu:a100:4(S:0-1)
long|64|gpu:a100:4,gpu:v100:4
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH, with commands that say what SLURM might."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    says(folder, "scontrol", PARTITIONS)
    says(folder, "sinfo", NODES)
    says(folder, "sbatch", "12\n")
    return folder


def says(folder: Path, command: str, words: str, code: int = 0) -> None:
    text = f"#!/bin/sh\ncat >/dev/null\ncat <<'WORDS'\n{words}WORDS\nexit {code}\n"
    (folder / command).write_text(text)
    (folder / command).chmod(0o755)


def submit(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["submit", *arguments])
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--nodes=9"],
            "wait for ever: partition main gives a job 4 nodes at most, and 9 are asked for.",
        ),
        (["--nodes=3", "--partition=long"], "long gives a job 2 nodes at most"),
        (
            ["--time=2-0"],
            "main gives a job 1-00:00:00 at most, and 2-0 is asked for. It would fit into long",
        ),
        (["--gpus=8"], "main has nodes of 4 GPUs at most, and 8 are asked for. It would fit"),
        (["--cpus=48"], "main has nodes of 32 CPUs at most"),
        (
            ["--no-torchrun", "--ranks=65", "--partition=main,long"],
            "partition long has nodes of 64",
        ),
    ],
)
def test_what_no_partition_has_is_said_before(
    script: str, slurm: Path, arguments: list[str], words: str
) -> None:
    code, text = submit(*arguments, script)
    assert code == 2
    assert words in text


@pytest.mark.parametrize(
    "arguments", [["--nodes=9", "--sbatch=qos=big"], ["--gpus=8", "--partition=main,long"]]
)
def test_what_may_fit_is_submitted(script: str, slurm: Path, arguments: list[str]) -> None:
    assert submit(*arguments, script)[0] == 0


def test_where_partitions_cannot_be_asked(script: str, slurm: Path) -> None:
    says(slurm, "scontrol", "slurm_load_partitions: Unable to contact slurm controller\n", 1)
    assert submit("--nodes=9", script)[0] == 0


def test_what_it_says_of_the_log(script: str, slurm: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    code, text = submit("--sbatch=chdir=there", "--sbatch=output=logs/%x/%j.log", script)
    assert code == 0
    log = tmp_path / "there" / "logs" / "train" / "12.log"
    assert f"log   {log}\nsee   tail -F {log} " in text
    assert log.parent.is_dir()
    code, text = submit("--sbatch=output=%j/log", script)
    assert code == 2
    assert "the log's folder must be there before the job has a number" in text
    (tmp_path / "file").touch()
    code, text = submit("--sbatch=output=file/%j.log", script)
    assert code == 2
    assert "cannot be made" in text


def test_what_it_says_of_an_array(script: str, slurm: Path, tmp_path: Path) -> None:
    code, text = submit("--sbatch=array=0-3", script, "--run-dir={task}")
    assert code == 0
    assert f"tail -F {tmp_path}/train-12_*.log " in text
    assert "scancel --batch --signal=USR1 12_0 " in text
    assert "12_0 is task 0 of the array 0-3; scancel 12 ends all of them" in text


def test_a_script_is_found_from_where_the_job_runs(
    script: str, slurm: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    assert f"\nset -- {script}\n" in dry("--sbatch=chdir=there", "train.py")[1]


# ----------------------------------------------------------------------- dtrain submit --status


def left(run: Path, job: str | None, **status: object) -> None:
    run.mkdir(exist_ok=True)
    facts = {"status": "running", "reason": "", "step": 62, "failures": 0, "updated": 0.0}
    (run / "status.json").write_text(json.dumps(facts | status))
    (run / ".writer").write_text(json.dumps({"token": "x"} | ({"job": job} if job else {})))


def test_where_a_run_and_its_job_stand(slurm: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    left(run, "12_3", failures=1)
    shown = "JobId=15 ArrayJobId=12 JobName=a JobState=RUNNING Reason=None Restarts=2 Requeue=1 "
    shown += "StartTime=2026-01-02T03:04:05 EndTime=2026-01-02T07:04:05 ReqNodeList=(null) "
    says(slurm, "scontrol", shown + "NodeList=n[1-2] StdOut=/my work/a.log Power=\n")
    code, text = submit("--status", str(run))
    assert code == 0
    lines = text.splitlines()
    assert lines[0] == f"run       {run}: running"
    assert lines[1].startswith("step      62, as of ")
    assert lines[2:] == [
        "failures  1 in a row",
        "job       12_3: RUNNING on n[1-2]",
        "restarts  2",
        "ends      2026-01-02 07:04:05 at most",
        "log       /my work/a.log",
    ]


@pytest.mark.parametrize(
    ("status", "last"),
    [
        ("running", "it was ended before it could say why; submitted again, it goes on"),
        ("preempted", "submitted again with the same run_dir; it goes on where it was saved"),
        ("failed", "mend the cause, then submit it again with the same run_dir; it goes on where"),
    ],
)
def test_a_run_whose_job_is_gone(slurm: Path, tmp_path: Path, status: str, last: str) -> None:
    says(slurm, "scontrol", "slurm_load_jobs error: Invalid job id specified\n", 1)
    says(slurm, "sacct", "", 1)
    left(tmp_path / "run", "12", status=status, reason="SIGUSR1\nand more")
    code, text = submit("--status=run")
    assert code == 0
    assert text.startswith(f"run       run: {status}, SIGUSR1\n")
    assert "12: SLURM no longer knows it, or is not here to be asked" in text
    assert last in text.splitlines()[-1]


def test_a_run_without_a_job_and_no_run(slurm: Path, tmp_path: Path) -> None:
    left(tmp_path / "run", None, status="finished", reason="all epochs done")
    code, text = submit("--status=run")
    assert code == 0
    assert text.splitlines()[-1] == "job       not known: the run has left no word of a SLURM job"
    code, text = submit("--status=nothere")
    assert code == 2
    assert "nothere holds no run" in text


def test_a_run_of_another_scheduler(slurm: Path, tmp_path: Path) -> None:
    left(tmp_path / "run", "12", status="finished")
    (tmp_path / "run" / ".writer").write_text('{"scheduler": "PBS", "job": "12.pbs"}')
    assert (
        submit("--status=run")[1].splitlines()[-1] == "job       12.pbs of PBS, which is not asked"
    )
