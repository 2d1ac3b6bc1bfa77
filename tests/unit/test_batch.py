"""Batch scripts for SLURM, and the command that submits them; without a SLURM."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

from dtrain.cli import app
from dtrain.cluster.batch import Kind, render
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
    assert "-m torch.distributed.run" in text
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
