"""Runs that older code began go on, and end as they would have ended then.

``tests/fixtures`` holds them, and ``tests/fixtures/make.py`` says how they were made. Bits are
compared where this machine computes as the one did that made them: the same torch, kind of CPU,
random numbers, and bits of a few steps without dtrain. Elsewhere numbers are compared, within what
the run's ``expected.json`` says: 1e-5 in float32, 1e-3 where 16 bits are rounded to.
"""

import csv
import functools
import json
import math
import shutil
from pathlib import Path

import pytest
from fixtures import training

import dtrain
from dtrain.testing import run_processes

FIXTURES = Path(training.__file__).parent
KEPT = sorted(path.parent.name for path in FIXTURES.glob("*/expected.json"))
DIGESTS = ("weights_sha256", "optimizer_sha256")


def expected_of(name):
    return json.loads((FIXTURES / name / "expected.json").read_text())


UNFINISHED = [name for name in KEPT if expected_of(name)["status"] == "running"]
FINISHED = [name for name in KEPT if expected_of(name)["status"] == "finished"]


@functools.cache
def machine():
    return training.machine()


def has_same_bits(expected):
    return {**machine(), "dtrain": expected["made_by"]["dtrain"]} == expected["made_by"]


@pytest.fixture
def run(request, tmp_path):
    """A copy of a kept run."""
    return shutil.copytree(FIXTURES / request.param / "run", tmp_path / "run")


def kept(names):
    """Parametrizes a test with kept runs, and copies of them."""
    return pytest.mark.parametrize(
        ("name", "run"), [(n, n) for n in names], indirect=["run"], ids=names
    )


def go_on(expected, run, spoil=False):
    """Goes on with a run; returns what each rank returned."""
    arguments = expected["training"], run, -1, spoil
    if expected["ranks"] == 1:
        return [training.train(*arguments)]
    return run_processes(training.train, expected["ranks"], *arguments)


def differences(found, wanted, within, place="end"):
    """Returns where the two differ: at all, or by more than ``within`` where that is not 0.

    An evaluation's figures may in the last digit: sets are cut into other micro-batches since.
    """
    within = max(within, 1e-6) if "eval/" in place else within
    if isinstance(wanted, dict) and isinstance(found, dict) and within:
        found, wanted = ({k: v for k, v in d.items() if k not in DIGESTS} for d in (found, wanted))
    if isinstance(wanted, dict) and isinstance(found, dict) and found.keys() == wanted.keys():
        parts = [(f"{place}, {key}", found[key], wanted[key]) for key in wanted]
    elif isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        parts = [(f"{place} {i}", *pair) for i, pair in enumerate(zip(found, wanted, strict=True))]
    elif isinstance(wanted, float) and isinstance(found, float) and within:
        near = math.isclose(found, wanted, rel_tol=within, abs_tol=within)
        return [] if near else [f"{place}: {found!r}, not {wanted!r}"]
    else:
        return [] if found == wanted else [f"{place}: {found!r}, not {wanted!r}"]
    return [told for at, *pair in parts for told in differences(*pair, within, at)]


def without(values, *prefixes):
    """Returns figures without those that newer code gives another meaning."""
    return {name: v for name, v in values.items() if not name.startswith(prefixes)}


def compare(end, run, expected, name, within):
    """Returns where a run came to another end than it should, or on another way.

    v1 reported the next step's learning rate, of the first group only; it had no figures of an
    epoch, and kept the last report's of the training to the end.
    """
    lines = (FIXTURES / name / "rows.jsonl").read_text().splitlines()
    rows, mine = [json.loads(line) for line in lines], training.rows(run)
    ends = [end, expected["end"]]
    if name.startswith("v1-"):
        rows = [without(row, "lr") for row in rows]
        mine = [without(row, "lr") for row in mine if row["kind"] != "epoch"]
        others = ("lr", "epoch/", "train/")
        ends = [one | {"metrics": without(one["metrics"], *others)} for one in ends]
    found = differences(*ends, within)
    found += differences(mine, rows, within, "row")
    net = training.make_net()
    folder = dtrain.load_model(run, net, which="raw").parent.name
    saved = {"folder": folder, "weights_sha256": training.digest(net.state_dict())}
    return found + differences(saved, expected["last_saved"], within, "saved")


def test_no_kept_run_is_lost():
    assert {"v1-one-rank", "v1-two-ranks", "v1-stream", "v1-finished"} <= set(KEPT)
    assert sorted(UNFINISHED + FINISHED) == KEPT


@kept(UNFINISHED)
def test_a_run_of_older_code_goes_on(name, run):
    expected = expected_of(name)
    (saved,) = (run / "checkpoints").glob("step-*")
    ranks = go_on(expected, run)
    assert [rank["began"] for rank in ranks] == [expected["step"]] * len(ranks)
    told = [line for line in ranks[0]["said"] if line.startswith("continuing at step ")]
    assert len(told) == 1
    assert told[0].startswith(f"continuing at step {expected['step']} from {saved} (the same make")
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    rows = training.rows(run)
    with (run / "metrics.csv").open(newline="") as file:
        table = [(int(row["step"]), row["kind"]) for row in csv.DictReader(file)]
    assert table == [(row["step"], row["kind"]) for row in rows]
    if machine()["draws"] != expected["made_by"]["draws"]:
        pytest.skip("it went on; but this torch draws other random numbers, so its end is another")

    within = 0.0 if has_same_bits(expected) else expected["within"]
    for rank in ranks:
        assert compare(rank["end"], run, expected, name, within) == []


@kept(UNFINISHED)
def test_it_would_be_noticed_if_it_did_not(name, run):
    expected = expected_of(name)
    for rank in go_on(expected, run, spoil=True):
        places = {told.split(":")[0] for told in compare(rank["end"], run, expected, name, 0.0)}
        assert {"end, optimizer_sha256", "saved, weights_sha256"} <= places
        far = compare(rank["end"], run, expected, name, expected["within"])
        assert any("train/loss" in told for told in far)


@kept(KEPT)
def test_weights_of_older_code_are_read(name, run):
    expected = expected_of(name)
    net = training.make_net()
    step = f"step-{expected['step']:08d}"
    assert (
        dtrain.load_model(run, net, which="raw") == run / "checkpoints" / step / "model.safetensors"
    )
    assert training.digest(net.state_dict()) == expected["saved_weights_sha256"]


@kept(FINISHED)
def test_a_run_that_older_code_finished_is_refused(name, run):
    expected = expected_of(name)
    with pytest.raises(dtrain.DtrainError) as raised:
        go_on(expected, run)
    end = expected["end"]
    assert type(raised.value).__name__ == "ResumeError"
    told = f"the run in {run} is finished ({end['stop_reason']}; step {end['steps']}, "
    assert str(raised.value).startswith(f"{told}{end['epochs']} epochs). To go on, ask for more")
    for choice in ("larger epochs", "another run_dir", "resume='never'"):
        assert choice in str(raised.value)
