"""`dtrain ablate --ranks 2`: the table of one rank, and what becomes of ranks that are lost."""

import json
import re
from pathlib import Path

import ablating
import pytest

SCRIPT = Path(__file__).with_name("ranks_script.py")

pytestmark = pytest.mark.timeout(150)


def ablate(folder, name, *arguments, habits=(), status=0):
    """Returns the rows of its table, what it printed, and the study's folder."""
    more = ["--", "--habits", *habits] if habits else []
    asked = [f"--folder={name}", *arguments, SCRIPT, *more]
    done = ablating.run(folder, *asked, status=status)
    rows = json.loads((folder / name / "table.json").read_text())["rows"] if status == 0 else []
    return {row["variant"]: row for row in rows}, done, folder / name


def of(study, place):
    return json.loads((study / place / "run.json").read_text())


@pytest.mark.slow
def test_two_ranks_give_the_table_of_one(tmp_path):
    """Also where the script does all that makes seeds and folders hard."""
    asked = ["--without=EMA", "--seeds=2", "--jobs=2"]
    one, _, _ = ablate(tmp_path, "one", *asked)
    # The model made before dtrain.init, or without one; a seed, sinks, and a resume of its own.
    habits = ["model-first", "no-init", "trainer-seed", "sinks", "must", "chdir", "prints", "exit"]
    two, _, _ = ablate(tmp_path, "two", *asked, "--ranks=2", habits=[*habits, "workers"])
    for name, row in one.items():
        for key in ("mean", "spread", "difference", "low", "high"):
            assert two[name][key] == (row[key] and pytest.approx(row[key], rel=0, abs=1e-6)), key
        assert two[name]["verdict"] == row["verdict"]
        assert two[name]["finished"] == 2


@pytest.mark.slow
def test_a_lost_rank_is_a_row_and_goes_on_when_asked_to(tmp_path):
    asked = ["--variant=lost", "--set=Odd.at=13", "--set=Odd.what=kill", "--seeds=1", "--ranks=2"]
    rows, done, study = ablate(tmp_path, "study", *asked)
    assert (rows["lost"]["failed"], rows["base"]["finished"]) == (1, 1)
    assert "lost: failed in 1 of 1 seeds, the base in none" in done.stdout
    assert "rank 1 on " in of(study, "lost/seed-0")["error"]
    assert "its process is gone" in of(study, "lost/seed-0")["error"]
    rows, done, _ = ablate(tmp_path, "study", *asked)
    assert " of 1: " not in done.stderr  # what has failed is not run again unasked
    rows, done, _ = ablate(tmp_path, "study", *asked, "--retry")
    assert "1 of 1: lost, seed 0" in done.stderr
    assert "2 of " not in done.stderr
    said = (study / "lost" / "seed-0" / "rank-0.txt").read_text()
    # The one of step 10 may have been under way.
    assert re.search(r"continuing at step (5|10) from ", said)
    assert rows["lost"]["mean"] == rows["base"]["mean"]  # to the last bit, as if not lost


@pytest.mark.slow
def test_a_rank_that_stops_is_a_row(tmp_path):
    asked = ["--variant=stops", "--set=Odd.at=13", "--set=Odd.what=stop", "--seeds=1", "--ranks=2"]
    rows, _, study = ablate(tmp_path, "study", *asked, habits=["early", "evals", "override"])
    assert (rows["stops"]["failed"], rows["base"]["finished"]) == (1, 1)
    assert "its process is stopped" in of(study, "stops/seed-0")["error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("habit", "words"),
    [
        ("_exit", "the script ended its own process (os._exit), so it is not known whether"),
        ("removes", "the script has deleted its run_dir, and its figures with it"),
    ],
)
def test_what_leaves_no_trace_is_said_and_not_run_for_ever(tmp_path, habit, words):
    _, done, study = ablate(tmp_path, "study", "--without=EMA", habits=[habit], status=2)
    assert f"fails as 'base', with which all is compared (seed 0): {words}" in done.stderr
    assert of(study, "base/seed-0")["state"] == "failed"


def test_a_seed_that_does_not_reach_the_model_is_noted(tmp_path):
    _, done, _ = ablate(tmp_path, "study", "--without=EMA", "--seeds=2", habits=["manual-seed"])
    assert "Note: seeds begin with the same weights: the seed does not reach" in done.stdout
