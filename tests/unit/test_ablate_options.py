"""How the command line of `dtrain ablate` is read: whose an option is, and what it makes."""

import sys

import pytest
import typer

from dtrain.cli import app
from dtrain.errors import ConfigError

ablate = sys.modules["dtrain.cli.ablate"]
COMMAND = typer.main.get_command(app).commands["ablate"]


def parsed(*args):
    """Returns the script's arguments, all other parameters, and the variants' names."""
    context = COMMAND.make_context("ablate", list(args))
    variants = ablate._variants(context.meta["changes"])
    return list(context.params["args"] or ()), context.params, [v.name for v in variants]


@pytest.fixture
def script(tmp_path):
    """A script that has an option --mode, as ours has."""
    file = tmp_path / "train.py"
    file.write_text("parser.add_argument('--mode')\n")
    return str(file)


def test_each_change_is_a_variant_in_the_order_of_the_line(script):
    line = ["--set", "EMA.decay=0.9", "--without=EMA", "--arg", "--lr 1", "--set=A.b=1", script]
    assert parsed(*line)[2] == ["EMA.decay=0.9", "without EMA", "--lr 1", "A.b=1"]


def test_a_named_variant_takes_what_follows_it(script):
    line = ["--without=A", "--variant", "no guards", "--without=B", "--set=C.d=1"]
    line += ["--variant=two", "--arg=--x 1", script]
    assert parsed(*line)[2] == ["without A", "no guards", "two"]
    context = COMMAND.make_context("ablate", line)
    found = ablate._variants(context.meta["changes"])
    assert [[str(c) for c in v.changes] for v in found] == [
        ["without A"],
        ["without B", "C.d=1"],
        ["--x 1"],
    ]


@pytest.mark.parametrize(
    "line", [["--variant=a", "--variant=b", "--without=B"], ["--without=B", "--variant=a"]]
)
def test_a_named_variant_that_changes_nothing(script, line):
    with pytest.raises(ConfigError, match="--variant 'a': name what it changes after it"):
        parsed(*line, script)


def test_options_stand_before_and_after_the_scripts_name(script):
    args, params, names = parsed(script, "--lr", "0.1", "--without", "EMA", "--seeds=3", "-v", "x")
    assert args == ["--lr", "0.1", "-v", "x"]
    assert params["seeds"] == "3"
    assert names == ["without EMA"]


def test_what_could_be_either_ones_is_asked(script):
    with pytest.raises(typer.BadParameter, match=r"--mode stands after .*train\.py, which"):
        parsed(script, "--mode", "max", "--without=EMA")
    with pytest.raises(typer.BadParameter, match="--mode"):
        parsed("--without=EMA", script, "--mode=max")
    args, params, _ = parsed("--mode=max", "--without=EMA", script, "--", "--mode", "wide")
    assert args == ["--mode", "wide"]
    assert params["mode"] == "max"
    assert parsed("--mode", "max", script)[1]["mode"] == "max"


def test_a_misspelt_option_is_not_the_scripts(script):
    with pytest.raises(typer.BadParameter, match=r"--wihtout: did you mean --without\? If it is"):
        parsed(script, "--wihtout", "EMA", "--without=A")
    assert parsed("--without=A", script, "--", "--wihtout", "EMA")[0] == ["--wihtout", "EMA"]
    assert parsed("--seeds=2", script, "--without=A", "--", "--seeds", "4")[0] == ["--seeds", "4"]


def test_seeds():
    assert ablate._seeds("3") == [0, 1, 2]
    assert ablate._seeds("7,3") == [7, 3]
    assert ablate._seeds("7,") == [7]
    for wrong in ("", "x", "0", "1,1", "1.5"):
        with pytest.raises(ConfigError, match="seeds"):
            ablate._seeds(wrong)
